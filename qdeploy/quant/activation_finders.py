"""Range finders for activations: from statistics of all values to a scale and a zero point.

All of them are functions of exact statistics (`qdeploy.quant.activation_statistics`), so no result depends on the
order of the calibration rows or on batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.histogram import Histogram
from qdeploy.quant.ranges import SHRINKS, to_scale
from qdeploy.recipe.formats import Format

RUNNING_BATCH = 16  # rows that the reference code takes the extremes of at a time
_FURTHER = tuple(SHRINKS[-1] * 0.95**i for i in range(1, 60))  # for heavy tails: down to 1 % of the range
_ROUNDS = 2  # of the search for either end of an asymmetric range

Finder = Callable[[ActivationStatistics, Format], tuple[Tensor, Tensor]]


def minmax(statistics: ActivationStatistics, number_format: Format) -> tuple[Tensor, Tensor]:
    """Cover every value that was seen."""
    return to_scale(torch.tensor(statistics.low), torch.tensor(statistics.high), number_format)


def percentile(
    statistics: ActivationStatistics, number_format: Format, percent: float = 99.99
) -> tuple[Tensor, Tensor]:
    """Cover all but the outermost ``100 - percent`` per cent of all values, at either end."""
    histogram = statistics.histogram
    low, high = (histogram.quantile(share) for share in (1 - percent / 100, percent / 100))
    return to_scale(low[0], high[0], number_format)


def running(statistics: ActivationStatistics, number_format: Format) -> tuple[Tensor, Tensor]:
    """Mean over batches of 16 rows of the batches' extremes, over all batches that there are.

    TFMQ-DM's code lets the extremes of shuffled batches run into an average with a momentum of 0.95; its expectation
    over shuffles is this mean. It is computed from the sorted extremes of rows: of all batches of b out of n rows,
    ``C(i, b - 1) / C(n, b)`` have the row with i smaller ones as their largest.
    """
    lows, highs = statistics.joined()
    return to_scale(-_mean_of_largest(-lows), _mean_of_largest(highs), number_format)


def _mean_of_largest(values: Tensor, batch: int = RUNNING_BATCH) -> Tensor:
    """The expected maximum of ``batch`` of some values, drawn without replacement."""
    ascending = values.double().sort().values
    count = len(ascending)
    if count <= batch:
        return ascending[-1]
    smaller = torch.arange(batch - 1, count, dtype=torch.float64)
    logs = torch.lgamma(smaller + 1) - torch.lgamma(smaller - batch + 2)
    return (ascending[batch - 1 :] * torch.softmax(logs, 0)).sum()


def lp(statistics: ActivationStatistics, number_format: Format, p: float = 2.4) -> tuple[Tensor, Tensor]:
    """The range with the least mean of ``|x - x_hat|**p`` over all values.

    Both ends are shrunk jointly, by the factors of `lp_weights` and further ones for heavy tails; where the format
    has a zero point, either end is then searched for with the other one fixed.
    """
    scale, zero_point = least_error(statistics.histogram, number_format, p)
    return scale[0], zero_point[0]


def mse(statistics: ActivationStatistics, number_format: Format) -> tuple[Tensor, Tensor]:
    """The range with the least mean square error, found as `lp` finds its own."""
    return lp(statistics, number_format, 2.0)


def least_error(histogram: Histogram, number_format: Format, p: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point [K] of least error for each set of a histogram."""
    shrinks = torch.tensor(SHRINKS + _FURTHER)[:, None]
    low, high = histogram.low.cpu(), histogram.high.cpu()
    low, high = _best(histogram, number_format, p, low * shrinks, high * shrinks)
    if not number_format.symmetric:
        first, last = histogram.low.cpu(), histogram.high.cpu()
        for _ in range(_ROUNDS):
            low, high = _best(histogram, number_format, p, *_with(low, high, first * shrinks, None))
            low, high = _best(histogram, number_format, p, *_with(low, high, None, last * shrinks))
    return to_scale(low, high, number_format)


def _with(low: Tensor, high: Tensor, lows: Tensor | None, highs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Candidates [N, K] of one end with the other one fixed; the present range comes first."""
    moved = lows if lows is not None else highs
    assert moved is not None
    fixed = (low if lows is None else high).expand_as(moved)
    present = torch.stack([low, high])[:, None]
    ends = torch.stack([moved, fixed] if lows is not None else [fixed, moved])
    return tuple(torch.cat([present, ends], 1))


def _best(
    histogram: Histogram, number_format: Format, p: float, lows: Tensor, highs: Tensor
) -> tuple[Tensor, Tensor]:
    """The ends [K] of least error out of candidates [N, K]; of equal ones the first."""
    errors = histogram.error(*to_scale(lows, highs, number_format), number_format, p)
    chosen = errors.argmin(0, keepdim=True)
    return lows.gather(0, chosen)[0], highs.gather(0, chosen)[0]


def entropy(statistics: ActivationStatistics, number_format: Format) -> tuple[Tensor, Tensor]:
    """The range whose quantized distribution diverges least from the original one (Kullback-Leibler).

    As Migacz, "8-bit inference with TensorRT" (GTC 2017), describes it: what lies outside is added to the outermost
    bins of the original, and the mass of a code is spread evenly over those of its bins that hold values.
    """
    histogram = statistics.histogram
    shrinks = torch.tensor(SHRINKS)
    low, high = histogram.low.cpu()[0], histogram.high.cpu()[0]
    if not float(high - low) > 0:
        return to_scale(low, high, number_format)
    lows, highs = low * shrinks, high * shrinks
    scales, zero_points = to_scale(lows, highs, number_format)
    fine, mass = _evenly(histogram, 8 * (number_format.qmax - number_format.qmin + 1))
    scores = []
    for scale, zero_point in zip(scales.double(), zero_points.double(), strict=True):
        codes = (fine / scale).round() + zero_point
        clamped = codes.clamp(number_format.qmin, number_format.qmax)
        inside = codes == clamped
        code = (clamped - number_format.qmin).long()
        count = number_format.qmax - number_format.qmin + 1
        held = inside & (mass > 0)
        of_code = torch.zeros(count, dtype=torch.float64).index_add(0, code[inside], mass[inside])
        bins = torch.zeros(count, dtype=torch.float64).index_add(0, code[held], torch.ones_like(mass[held]))
        outside = torch.zeros(count, dtype=torch.float64).index_add(0, code[~inside], mass[~inside])
        original = mass + torch.where(held, outside[code] / bins[code].clamp(min=1), 0.0)
        kept = held & (original > 0)
        q = of_code[code[kept]] / bins[code[kept]]
        lost = mass[~inside].sum() if not held.any() else mass.new_zeros(())
        original_kept = original[kept]
        q = q / q.sum().clamp(min=1e-300)
        original_kept = original_kept / original_kept.sum().clamp(min=1e-300)
        scores.append((original_kept * (original_kept / q).log()).sum() + lost)
    best = int(torch.stack(scores).argmin())
    return scales[best], zero_points[best]


def _evenly(histogram: Histogram, bins: int) -> tuple[Tensor, Tensor]:
    """Centres and masses of equally wide bins over the whole range."""
    edges, counts = histogram.filled()
    low, high = float(edges.min()), float(edges.max())
    at = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    left, right = edges.unbind(1)
    width = (right - left).clamp(min=1e-300)
    reached = (((at[:, None] - left) / width).clamp(0, 1) * counts[0]).sum(1)
    return (at[1:] + at[:-1]) / 2, reached.diff() / counts.sum()


ACTIVATION_FINDERS: dict[str, Finder] = {
    "minmax": minmax,
    "percentile": percentile,
    "running": running,
    "lp": lp,
    "mse": mse,
    "entropy": entropy,
}
# Finders for single channels: the exponent of the error that they minimise, 0 for none.
CHANNEL_FINDERS = {"minmax": 0.0, "lp": 2.4, "mse": 2.0}


def channel_ranges(
    statistics: ActivationStatistics, finder: str, number_format: Format
) -> tuple[Tensor, Tensor]:
    """Scale [C] and zero point [C], each channel's by itself (QuEST, arXiv 2402.03666, for 4-bit activations).

    Scales along the features stand inside of a layer's sum, where no static integer kernel can take them out:
    what has them is a simulation.

    Args:
        statistics: with histograms of channels.
        finder: one of `CHANNEL_FINDERS`.
        number_format: the grid.
    """
    histogram = statistics.histogram
    if p := CHANNEL_FINDERS[finder]:
        return least_error(histogram, number_format, p)
    return to_scale(histogram.low.cpu(), histogram.high.cpu(), number_format)
