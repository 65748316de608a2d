"""The ranking of layers that ``qdeploy sensitivity`` leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.denoiser import read_json
from qdeploy.errors import InvalidInputError

FILE = "sensitivity.json"


def read_sensitivity(path: str | Path) -> list[dict[str, Any]]:
    """Layers with the harm of quantizing each, the most harmful first.

    Args:
        path: the artifact's folder, or its ``sensitivity.json``.

    Returns:
        ``name``, ``bits`` and ``harm_db`` of each; other keys as they stand there.

    Raises:
        InvalidInputError: there is no such ranking.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    layers = read_json(file).get("layers")
    if not isinstance(layers, list) or not all(
        isinstance(layer, Mapping) and {"name", "harm_db"} <= layer.keys() for layer in layers
    ):
        raise InvalidInputError(f"{file} holds no list of layers with their harm_db")
    ranked = [dict(layer) for layer in layers if layer["harm_db"] is not None]
    return sorted(ranked, key=lambda layer: -float(layer["harm_db"]))
