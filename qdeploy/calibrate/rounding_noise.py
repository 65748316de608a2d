"""What quantization does to a layer's output, estimated from ranges: to choose between forms before any is tried."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import Format

LEAST_GAIN = 0.05  # of the estimated noise; below it, a rewrite is not worth its operations


def rounding_noise(
    modules: Sequence[QuantizedLayer],
    low: Tensor,
    high: Tensor,
    square: Tensor,
    factors: Tensor,
    labels: Tensor | None,
) -> float:
    """Estimated rounding noise of the outputs of layers that read one tensor, up to a constant.

    The rounding error of an input is spread evenly over its step, so its power is step^2 / 12, and it meets the
    weight; that of the weight, rounded to nearest with min-max scales, meets the input. Errors are taken for
    independent of each other.

    Args:
        modules: the layers.
        low: [C] smallest value of each input channel.
        high: [C] largest value.
        square: [C] mean square.
        factors: [C] what the input channels are divided by, and the weight multiplied.
        labels: [C] groups that are split, so that weights have scales of their own and stay as they are; None
            where the factors are folded.
    """
    weights, activations = modules[0].formats
    assert activations is not None
    steps = _steps(low, high, factors, labels, activations)
    total = 0.0
    for module in modules:
        weight = module.weight.detach().float().cpu().reshape(module.channels, len(factors), -1)  # [O, C, k]
        total += float((weight.square().sum((0, 2)) * steps.square()).double().sum()) / 12
        if weights is not None:
            error = _weight_error(weight, weights, factors, labels)
            total += float((error.square().sum((0, 2)) * square.float()).double().sum())
    return total


def relative_noise(
    modules: Sequence[QuantizedLayer], low: Tensor, high: Tensor, square: Tensor, factors: Tensor
) -> float:
    """`rounding_noise` of each output channel as a share of its signal, summed over the channels.

    Where a normalisation follows, a channel's noise counts as much as any other's, however small the channel is.
    Input channels are taken for independent of each other.
    """
    weights, activations = modules[0].formats
    steps = torch.zeros_like(low) if activations is None else _steps(low, high, factors, None, activations)
    total = 0.0
    for module in modules:
        weight = module.weight.detach().float().cpu().reshape(module.channels, len(factors), -1)
        gains = weight.double().square().sum(2)  # [O, C]
        noise = gains @ steps.double().square() / 12
        if weights is not None:
            error = _weight_error(weight, weights, factors, None).double().square().sum(2)
            noise = noise + error @ square.double()
        signal = gains @ square.double()
        total += float((noise / signal.clamp(min=torch.finfo(torch.float64).tiny)).sum())
    return total


def _steps(low: Tensor, high: Tensor, factors: Tensor, labels: Tensor | None, activations: Format) -> Tensor:
    """[C] steps of the input channels; a zero point is that of the tensor, or of the group where groups are split."""
    if activations.symmetric:
        return factors * (torch.maximum(-low, high) / factors).amax() / activations.qmax
    codes = activations.qmax - activations.qmin
    low, high = low.clamp(max=0), high.clamp(min=0)
    if labels is None:
        return factors * ((high / factors).amax() - (low / factors).amin()) / codes
    spans = torch.zeros(int(labels.max()) + 1, dtype=low.dtype)
    spans = spans.scatter_reduce(0, labels, high, "amax") - spans.scatter_reduce(0, labels, low, "amin")
    return spans[labels] / codes


def _weight_error(weight: Tensor, number_format: Format, factors: Tensor, labels: Tensor | None) -> Tensor:
    """Error of a weight [O, C, k], rounded to nearest with min-max scales; arguments as for `rounding_noise`."""
    if labels is not None:
        error = torch.empty_like(weight)
        for group in labels.unique():
            own = labels == group
            error[:, own] = _weight_error(weight[:, own], number_format, torch.ones(int(own.sum())), None)
        return error
    scaled = weight * factors[:, None]
    scale, zero = (x[:, None, None] for x in minmax_weights(scaled, number_format))
    hat = fake_quantize(scaled, scale, zero, number_format.qmin, number_format.qmax)
    return (scaled - hat) / factors[:, None]
