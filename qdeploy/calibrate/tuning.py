"""Tuning of chosen weights, and of activation scales: what is learned, and what is kept of it.

Rounding stays true to weights that move: a tuned weight is a number of steps on its frozen grid, begins at
the codes that were decided before, is rounded with a straight-through gradient at every step, and its
rounded self is what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdeploy.network.observe import ModuleCall, observing
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import code_type, per_channel, round_through
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer


class StraightThrough(nn.Module):
    """A weight on a frozen grid, rounded to nearest in every forward pass, with gradient.

    Attributes:
        u: [C, ...] the weight in steps of its channel.
        scale: [C, 1, ...] steps.
        zero_point: [C, 1, ...] codes of zero.
        begun: the codes that it began with.
    """

    scale: Tensor
    zero_point: Tensor
    begun: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        assert quantizer.codes is not None
        self.format = quantizer.format
        self.register_buffer("scale", per_channel(quantizer.scale, quantizer.codes.ndim))
        zero_point = per_channel(quantizer.zero_point, quantizer.codes.ndim)
        self.register_buffer("zero_point", zero_point.to(self.scale.dtype))
        self.register_buffer("begun", quantizer.codes)
        self.u = nn.Parameter(quantizer.codes.to(self.scale.dtype) - self.zero_point)

    def _steps(self) -> Tensor:
        codes = (round_through(self.u) + self.zero_point).clamp(self.format.qmin, self.format.qmax)
        return codes - self.zero_point

    def forward(self) -> Tensor:
        """The rounded weight."""
        return self._steps() * self.scale

    def codes(self) -> Tensor:
        """The rounded weight's codes."""
        return (self._steps() + self.zero_point).detach().to(code_type(self.format))


class Tuning:
    """What is tuned, as parameters that the network computes with.

    Args:
        layers: whose weights and biases are tuned, by path; their codes are decided.
        quantizers: whose scales are tuned, by name.

    Attributes:
        weights: of each layer, its parts in steps of their channels.
        biases: of each layer that has one, what is added to it, in steps of the channel's weight.
        logs: of each quantizer, the logarithm of its scale.
    """

    def __init__(
        self, layers: Mapping[str, QuantizedLayer], quantizers: Mapping[str, ActivationQuantizer]
    ) -> None:
        self.layers, self.quantizers = layers, quantizers
        self.weights = {
            path: [StraightThrough(quantizer) for quantizer, _ in layer.weight_pairs()]
            for path, layer in layers.items()
        }
        self._biases = {path: layer.bias.detach() for path, layer in layers.items() if layer.bias is not None}
        self._steps = {path: layer.weight_pairs()[0][0].scale for path, layer in layers.items()}
        self.biases = {path: nn.Parameter(torch.zeros_like(bias)) for path, bias in self._biases.items()}
        scales = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers.items()}
        self._scales = {name: (scale, scale.log()) for name, scale in scales.items()}
        self.logs = {name: nn.Parameter(begun.clone()) for name, (_, begun) in self._scales.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by name."""
        weights = {
            f"{path}.weight.{part}": grid.u
            for path, grids in self.weights.items()
            for part, grid in enumerate(grids)
        }
        biases = {f"{path}.bias": bias for path, bias in self.biases.items()}
        return {**weights, **biases, **{f"{name}.log": log for name, log in self.logs.items()}}

    def bias(self, path: str) -> Tensor:
        """A layer's bias as it is now."""
        return self._biases[path] + self.biases[path] * self._steps[path]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the student computes with the parameters, and the gradient reaches them."""

        def set_bias(call: ModuleCall) -> None:
            assert isinstance(call.module, QuantizedLayer)
            call.module.tuned_bias = self.bias(call.name)

        for path, layer in self.layers.items():
            for (quantizer, _), grid in zip(layer.weight_pairs(), self.weights[path], strict=True):
                quantizer.rounding = grid
        try:
            with (
                observing({path: self.layers[path] for path in self.biases}, set_bias),
                learned_scales(self.quantizers, self.logs),
            ):
                yield
        finally:
            for layer in self.layers.values():
                for quantizer, _ in layer.weight_pairs():
                    quantizer.rounding = None

    def decide(self) -> None:
        """Leave the network with what was learned: codes, tuned weights and biases, scales."""
        with torch.no_grad():
            for path, layer in self.layers.items():
                for (quantizer, _), grid in zip(layer.weight_pairs(), self.weights[path], strict=True):
                    quantizer.codes = grid.codes()
                layer.tuned = _joined(layer, [grid.u * grid.scale for grid in self.weights[path]])
                if path in self.biases:
                    layer.tuned_bias = self.bias(path)
            for name, log in self.logs.items():
                scale, begun = self._scales[name]
                self.quantizers[name].scale = torch.where(log == begun, scale, log.exp())

    def changed_codes(self) -> Tensor:
        """How many codes are others than at the beginning, on the device that learns."""
        grids = [grid for parts in self.weights.values() for grid in parts]
        return sum(((grid.codes() != grid.begun).sum() for grid in grids), torch.zeros((), dtype=torch.int64))


@contextmanager
def learned_scales(
    quantizers: Mapping[str, ActivationQuantizer], logs: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within, every call of a quantizer uses ``exp(log)`` as its scale, with gradient.

    Args:
        quantizers: by any name.
        logs: logarithms of their scales, shaped like them, under the same names.
    """

    def before(call: ModuleCall) -> None:
        assert isinstance(call.module, ActivationQuantizer)
        call.module.scale = logs[call.name].exp()

    with observing(quantizers, before):
        yield


def _joined(layer: QuantizedLayer, parts: list[Tensor]) -> Tensor:
    """The weight whose parts, smoothed and in the order of the quantizers, are given."""
    weight = torch.cat(parts, 1)
    if layer.order is not None:
        weight = torch.empty_like(weight).index_copy(1, layer.order, weight)
    if layer.smoothing is not None:
        weight = weight / layer.smoothing.view(1, -1, *[1] * (weight.ndim - 2))
    return weight
