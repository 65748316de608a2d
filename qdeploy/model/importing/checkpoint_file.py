"""The tensors of a file that may come from anywhere: safetensors, or a pickle of which nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.model.tensor_files import load_tensors
from qdeploy.model.weights import read_tensors
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

# Training frameworks that store objects of their own with the weights. They are read without their code, and ignored.
_NOTES = ("pytorch_lightning.", "lightning.", "omegaconf.")


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, mapped into memory where the format allows it.

    Pickles are read with ``weights_only=True``. Objects of a training framework that are stored with the
    weights, as in the files of CompVis, are read as empty objects.

    Args:
        file: ``*.safetensors``, or anything that ``torch.save`` wrote.

    Raises:
        InvalidInputError: there is no such file, it holds code, or no tensors by name.
    """
    if not file.is_file():
        raise InvalidInputError(f"{file} does not exist" if not file.exists() else f"{file} is not a file")
    if file.suffix == ".safetensors":
        return dict(read_tensors([file]))
    content: Any = _unpickled(file)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    import torch

    if not isinstance(content, Mapping):
        raise InvalidInputError(f"{file} holds no model: a {type(content).__name__} and no tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise InvalidInputError(f"{file} holds no model: there is no tensor in it")
    return found


def _unpickled(file: Path) -> Any:
    import torch

    inert: list[Any] = []
    # Where this fails it is no archive of PyTorch; what it is instead is said below.
    with suppress(Exception):
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        inert = [(type("Note", (), {}), name) for name in foreign if name.startswith(_NOTES)]
    with torch.serialization.safe_globals(inert):
        return load_tensors(file)
