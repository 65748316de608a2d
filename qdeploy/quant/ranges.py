"""From ranges to scales and zero points, and range finders for weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qdeploy.quant.nvfp4 import tensor_scale, two_level_scales
from qdeploy.quant.operators import to_grid
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown

SHRINKS = tuple(1 - 0.01 * i for i in range(80))
_AT_ONCE = (
    2**18
)  # numbers of a small weight that are tried together: the overhead of operators outweighs them
_TOGETHER = 2**20  # numbers of a large weight that are tried together: they fit a processor's cache
_SMALLEST = torch.finfo(torch.float32).tiny * 2**10


def to_scale(low: Tensor, high: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]``; zero is always a code of its own.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        number_format: the grid.

    Returns:
        Scale (float32, positive) and zero point (int32), both shaped like ``low``. A range that holds
        only zero gets scale 1.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if number_format.symmetric:
        span, steps = torch.maximum(-low, high), number_format.qmax
    else:
        span, steps = high - low, number_format.qmax - number_format.qmin
    scale = torch.where(span > 0, (span / steps).clamp(min=_SMALLEST), torch.ones_like(span))
    if number_format.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (number_format.qmin - low / scale).round().clamp(number_format.qmin, number_format.qmax)
    return scale, zero_point.to(torch.int32)


def minmax_weights(weight: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover every weight: [C] per output channel, or [C, blocks]."""
    rows = _sharing(weight, number_format)
    return block_scale(rows.amin(-1), rows.amax(-1), number_format)


def lp_weights(weight: Tensor, number_format: Format, p: float = 2.4) -> tuple[Tensor, Tensor]:
    """Range per output channel or block, shrunk to minimise the mean of ``|w - w_hat|**p``.

    The range is shrunk jointly by 1.00, 0.99, ..., 0.21 (Q-Diffusion's released code, its ``mse`` search).
    """
    channels = max(1, _TOGETHER // max(1, weight[0].numel()))
    if number_format.two_levels or channels >= len(weight):  # the level above blocks is of the whole weight
        return _lp(_sharing(weight, number_format), number_format, p)
    parts = [_lp(_sharing(part, number_format), number_format, p) for part in weight.split(channels)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _lp(rows: Tensor, number_format: Format, p: float) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(-1), rows.amax(-1)
    best_scale, best_zero = block_scale(low, high, number_format)
    whole = tensor_scale(best_scale) if number_format.two_levels else None
    best = torch.full_like(best_scale, torch.inf)
    shrinks = torch.tensor(SHRINKS, dtype=torch.float64).to(rows).reshape(-1, *[1] * low.ndim)
    for some in shrinks.split(max(1, _AT_ONCE // max(1, rows.numel()))):
        scale, zero = block_scale(low * some, high * some, number_format)
        scale = scale if whole is None else two_level_scales(scale, whole)
        hat = to_grid(rows, scale[..., None], zero[..., None], number_format)
        scores = (rows - hat).abs_().pow_(p).mean(-1)
        smallest = scale[-1], zero[-1]
        first = scores.argmin(0, keepdim=True)  # the first of equal ones
        score, scale, zero = (values.gather(0, first)[0] for values in (scores, scale, zero))
        better = score < best
        best = torch.where(better, score, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        if whole is None and _hopeless(rows.shape[-1], low, high, *smallest, number_format, best, p):
            break
    return best_scale, best_zero


def _hopeless(
    count: int,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero: Tensor,
    number_format: Format,
    best: Tensor,
    p: float,
) -> bool:
    """Whether no smaller range can beat the best: it clips the largest value further, which alone costs more."""
    above = high - (number_format.qmax - zero) * scale
    below = (number_format.qmin - zero) * scale - low
    least = torch.maximum(above, below).clamp(min=0).pow(p) / count
    return bool(((least > 1.001 * best) | (best == 0)).all())


def block_scale(low: Tensor, high: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """`to_scale`; where formats have two levels of scales, a block of zeros does not raise the level above it."""
    scale, zero_point = to_scale(low, high, number_format)
    if number_format.two_levels and (used := (low != 0) | (high != 0)).any():
        scale = torch.where(used, scale, scale[used].min())
    return scale, zero_point


def _sharing(weight: Tensor, number_format: Format) -> Tensor:
    """The weight [C, ...] as [C, K], or in blocks [C, blocks, block]: weights that share a scale, last."""
    flat = weight.flatten(1)
    return flat.unflatten(1, (-1, number_format.block)) if number_format.block else flat


WEIGHT_FINDERS: dict[str, Callable[[Tensor, Format], tuple[Tensor, Tensor]]] = {
    "minmax": minmax_weights,
    "lp": lp_weights,
}


def check_finder(name: str, finders: Mapping[str, object]) -> None:
    """Refuse an unknown finder.

    Raises:
        UsageError: ``name`` is not among ``finders``.
    """
    if name not in finders:
        raise UsageError(unknown("range finder", name, finders))
