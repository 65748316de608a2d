"""Small trained models that the package ships, for the demo and the tests."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "zoo"


def zoo_models() -> list[str]:
    """Names of the models."""
    return sorted(index.parent.name for index in _FOLDER.glob("*/model_index.json"))


def find_zoo_model(name: str) -> Path | None:
    """Folder of the model of that name, if there is one."""
    return _FOLDER / name if name in zoo_models() else None
