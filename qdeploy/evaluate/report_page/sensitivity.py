"""The ranking of layers that ``qdeploy sensitivity`` wrote."""

from __future__ import annotations

from pathlib import Path

from qdeploy.mixed.ranking import LayerHarm, read_sensitivity_file

FILE = "sensitivity.json"


def read_sensitivity(path: str | Path) -> list[LayerHarm]:
    """Layers with the harm of quantizing each alone, most sensitive first.

    Args:
        path: the artifact's folder, or its ``sensitivity.json``.

    Raises:
        InvalidInputError: there is no such ranking.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    return read_sensitivity_file(file).harms()
