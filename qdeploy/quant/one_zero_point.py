"""Ranges of groups of timesteps around one zero point, so that one static graph holds them all.

A scale s that depends on the timestep can be taken out of a quantization with a zero point: ``x s0 / s`` in front of
it, ``s / s0`` behind the product that reads it. It is exact as long as the zero point is the same for all, as that of
a convolution's padding is. What a group loses by it is little where ranges keep their shape over the timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdeploy.quant.activation_finders import ACTIVATION_FINDERS, CHANNEL_FINDERS
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.ranges import SHRINKS
from qdeploy.recipe.formats import Format


def with_one_zero_point(
    groups: Sequence[ActivationStatistics], finder: str, number_format: Format
) -> tuple[Tensor, Tensor]:
    """Scales [K] and a zero point [] that serves all groups.

    The zero point is the one with the least sum of the groups' rounding noise, each relative to what it is with a
    zero point of its own; steps are as wide as it takes to cover the range that the finder finds for the group.
    Finders that minimise an error then choose among narrower steps.

    Args:
        groups: of the values in each group of timesteps.
        finder: one of `ACTIVATION_FINDERS`.
        number_format: of integers, with a zero point.
    """
    found = [ACTIVATION_FINDERS[finder](group, number_format) for group in groups]
    own = torch.stack([scale for scale, _ in found]).double()
    origins = torch.stack([zero_point for _, zero_point in found]).double()
    low = torch.maximum(own * (number_format.qmin - origins), torch.tensor([group.low for group in groups]))
    high = torch.minimum(own * (number_format.qmax - origins), torch.tensor([group.high for group in groups]))
    scales = covering(low, high, number_format)
    scales = torch.where(scales > 0, scales, own)  # a group that saw nothing but zero
    best = (scales / own).square().sum(1).argmin()
    zero_point = (number_format.qmin + best).to(torch.int32)
    chosen = [
        _narrowed(group, scale, zero_point, number_format, CHANNEL_FINDERS.get(finder, 0.0))
        for group, scale in zip(groups, scales[best].float(), strict=True)
    ]
    return torch.stack(chosen), zero_point


def covering(low: Tensor, high: Tensor, number_format: Format) -> Tensor:
    """[codes, K] the steps with which each code as the code of zero covers each of the ranges [K].

    Args:
        low: [K] at most 0.
        high: [K] at least 0.
        number_format: says which codes there are; a range that a code does not reach takes infinite steps.
    """
    codes = torch.arange(number_format.qmin, number_format.qmax + 1, dtype=torch.float64)[:, None]

    def steps(reach: Tensor, count: Tensor) -> Tensor:
        return torch.where(reach > 0, reach / count, 0.0)

    down, up = steps(-low, codes - number_format.qmin), steps(high, number_format.qmax - codes)
    return torch.maximum(down, up)


def _narrowed(
    group: ActivationStatistics, scale: Tensor, zero_point: Tensor, number_format: Format, p: float
) -> Tensor:
    """The step of least mean of ``|x - x_hat|**p``, at most ``scale``; the step itself where p is 0."""
    if not p:
        return scale
    scales = scale * torch.tensor(SHRINKS)
    errors = group.histogram.error(scales[:, None], zero_point.expand(len(scales))[:, None], number_format, p)
    return scales[errors[:, 0].argmin()]
