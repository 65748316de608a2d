"""Networks whose layers read their weights from the model's files, call by call: no weight stays in memory.

What streams a network's weights, one layer after the other, needs no network in memory. A forward pass still works:
each layer has its weight for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.fill import current_name, fill_tensors
from qdeploy.store.tensors import open_tensors

_STREAMED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_ATTRIBUTE = "_weight_in_file"


@dataclass(frozen=True)
class WeightInFile:
    """A weight that is read when it is needed.

    Attributes:
        file: a safetensors file.
        name: of the tensor in it.
    """

    file: Path
    name: str

    def read(self) -> Tensor:
        """The tensor, floats in float32, in memory of its own: the file is mapped no longer than this takes."""
        with open_tensors(self.file) as opened:
            stored: Tensor = opened.get_tensor(self.name)
            narrow = stored.is_floating_point() and stored.dtype != torch.float32
            return stored.float() if narrow else stored.clone()


def weight_of(layer: nn.Module) -> Tensor | None:
    """A layer's weight in float32: its own, or from its file where it is not loaded; None if it has none."""
    source: WeightInFile | None = layer.__dict__.get(_ATTRIBUTE)
    weight: Tensor | None = layer.weight  # type: ignore[assignment]
    return source.read() if source is not None and weight is not None and weight.is_meta else weight


def fill_but_weights(denoiser: nn.Module, files: Sequence[Path], folder: Path) -> None:
    """Load all but the weights of linear layers and convolutions, which are read at each of their calls.

    Args:
        denoiser: the network, its parameters without memory.
        files: its safetensors files.
        folder: of the network, for messages.

    Raises:
        InvalidInputError: as `qdeploy.model.fill.fill`; every weight is looked at once.
    """
    expected = denoiser.state_dict()
    places = {
        f"{path}.weight": module for path, module in denoiser.named_modules() if type(module) in _STREAMED
    }
    sources = [WeightInFile(file, name) for file in files for name in _names(file)]
    for source in sources:
        layer = places.get(current_name(source.name, expected))
        if layer is not None:
            layer.__dict__[_ATTRIBUTE] = source
    tensors = ((source.name, source.read()) for source in sources)
    fill_tensors(denoiser, tensors, folder, left=places)
    for layer in places.values():
        layer.register_forward_pre_hook(_load)
        layer.register_forward_hook(_unload, always_call=True)


def _names(file: Path) -> Iterator[str]:
    with open_tensors(file) as opened:
        yield from list(opened.keys())


def load_rest(denoiser: nn.Module, streamed: Collection[nn.Module]) -> None:
    """Load the weights that are not to be streamed.

    Args:
        denoiser: as `fill_but_weights` left it.
        streamed: layers that go on reading their weights.
    """
    for module in denoiser.modules():
        source: WeightInFile | None = module.__dict__.get(_ATTRIBUTE)
        if source is not None and module not in streamed:
            del module.__dict__[_ATTRIBUTE]
            module.weight = nn.Parameter(source.read(), requires_grad=False)


def _load(layer: nn.Module, args: Any) -> None:
    source: WeightInFile | None = layer.__dict__.get(_ATTRIBUTE)
    if source is not None:
        layer.weight = nn.Parameter(source.read(), requires_grad=False)


def _unload(layer: nn.Module, args: Any, output: Any) -> None:
    if _ATTRIBUTE in layer.__dict__ and isinstance(layer.weight, Tensor):
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
