"""Networks whose layers read their weights from the model's files, call by call: no weight stays in memory.

What streams a network's weights, one layer after the other, needs no network in memory. A forward pass still works:
each layer has its weight for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qdeploy.model.fill import current_name, fill_tensors
from qdeploy.store.tensors import open_tensors
from qdeploy.system.memory import give_back_freed

_STREAMED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_ATTRIBUTE = "_weight_in_file"
OFTEN = 2**28  # bytes read after which freed memory goes back to the system
_since_freed = [0]


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
            tensor = stored.float() if narrow else stored.clone()
        _since_freed[0] += tensor.nbytes
        if _since_freed[0] > OFTEN:
            _since_freed[0] = 0
            give_back_freed()
        return tensor


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
        # Not by hooks, which run outside of the layer: a tracer would take the reading for a part of the network.
        layer.__dict__["forward"] = partial(_forward, layer)


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
            del module.__dict__[_ATTRIBUTE], module.__dict__["forward"]
            module.weight = nn.Parameter(source.read(), requires_grad=False)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own forward, with its weight in place for as long as it runs."""
    source: WeightInFile = layer.__dict__[_ATTRIBUTE]
    described = layer._parameters["weight"]
    layer._parameters["weight"] = nn.Parameter(source.read(), requires_grad=False)
    try:
        output: Tensor = type(layer).forward(layer, x)
        return output
    finally:
        layer._parameters["weight"] = described
