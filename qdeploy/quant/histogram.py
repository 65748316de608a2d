"""Histograms of every value of a tensor, whose bins double in width from octave to octave.

The bins are the same for all tensors: each octave ``[2^e, 2^(e+1))`` of magnitudes is cut into equal parts, as the
leading bits of a float32 cut it. So a histogram needs no second pass and no range that is known before, counts
are exact, and histograms are merged by adding counts: nothing depends on the order of rows or on batch sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.quant.operators import to_grid
from qdeploy.recipe.formats import Format

LOWEST, OCTAVES = -32, 64  # magnitudes below 2^-32 count as zero, those above 2^32 lie in the last bin
_MANTISSA = 23  # bits of a float32's fraction
_POINTS = 8  # at which the error of a floating-point format is taken in each bin
_CHUNK = 2**21  # numbers that a search holds at a time


class Histogram:
    """Counts of the values of one tensor, or of several sets of them, such as its channels.

    Args:
        sets: K, how many sets of values are counted apart.
        bits: each octave is cut into ``2**bits`` bins.

    Attributes:
        counts: [K, bins] int64, on the device of the values; bins ascend from the most negative, and the one in
            the middle holds zero.
        low: [K] smallest value of each set, and 0 if all are positive.
        high: [K] largest value of each set, and 0 if all are negative.
    """

    def __init__(self, sets: int = 1, bits: int = 5) -> None:
        self.bits, self.half = bits, OCTAVES << bits
        self.counts = torch.zeros(sets, 2 * self.half + 1, dtype=torch.int64)
        self.low, self.high = torch.zeros(sets), torch.zeros(sets)

    def add(self, values: Tensor) -> None:
        """Count values: any shape for one set, [K, N] for several."""
        sets, bins = self.counts.shape
        flat = values.detach().float().reshape(sets, -1)
        if not flat.numel():
            return
        base = (127 + LOWEST) << self.bits
        place = (flat.abs().contiguous().view(torch.int32) >> (_MANTISSA - self.bits)) - (base - 1)
        place = place.clamp_(0, self.half)
        place = torch.where(flat < 0, self.half - place, self.half + place)
        if sets > 1:
            place += bins * torch.arange(sets, dtype=torch.int32, device=place.device)[:, None]
        counted = torch.bincount(place.flatten(), minlength=sets * bins).view(sets, bins)
        self.counts = self.counts.to(flat.device) + counted
        self.low = torch.minimum(self.low.to(flat.device), flat.amin(1))
        self.high = torch.maximum(self.high.to(flat.device), flat.amax(1))

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of the values of both; sets and bins must agree."""
        result = Histogram(len(self.counts), self.bits)
        result.counts = self.counts + other.counts.to(self.counts.device)
        result.low = torch.minimum(self.low, other.low.to(self.low.device))
        result.high = torch.maximum(self.high, other.high.to(self.high.device))
        return result

    def filled(self) -> tuple[Tensor, Tensor]:
        """The bins in which values lie, in double precision on the CPU.

        Returns:
            Edges [B, 2] of the bins that hold a value of any set, cut off at the smallest and the largest value
            of all, and counts [K, B].
        """
        counts = self.counts.cpu()
        used = counts.sum(0).nonzero().flatten()
        steps = torch.arange(self.half + 1, dtype=torch.float64)
        octave = torch.div(steps, 2**self.bits, rounding_mode="floor")
        magnitudes = torch.ldexp(1 + (steps - octave * 2**self.bits) / 2**self.bits, (octave + LOWEST).int())
        outer = torch.cat(
            [-magnitudes.flip(0), magnitudes]
        )  # [2 half + 2] edges; bin i lies between i and i + 1
        edges = torch.stack([outer[used], outer[used + 1]], 1)
        middle = used == self.half
        edges[middle] = 0.0
        low, high = float(self.low.min()), float(self.high.max())
        return edges.clamp(low, high), counts[:, used].double()

    def quantile(self, share: float) -> Tensor:
        """[K] the value below which a share of all values lies; spread evenly within a bin.

        Args:
            share: from 0 to 1.
        """
        edges, counts = self.filled()
        reached = counts.cumsum(1)
        wanted = share * reached[:, -1:]
        bin_of = torch.searchsorted(reached, wanted).clamp(max=len(edges) - 1)
        before = (reached - counts).gather(1, bin_of)
        part = ((wanted - before) / counts.gather(1, bin_of).clamp(min=1)).clamp(0, 1).flatten()
        left, right = edges[bin_of.flatten()].unbind(1)
        return left + part * (right - left)

    def error(self, scale: Tensor, zero_point: Tensor, number_format: Format, p: float) -> Tensor:
        """Mean of ``|x - x_hat|**p`` over the values of each set, for several grids.

        Values are taken to be spread evenly within their bin, and integrated over exactly where the format is an
        integer one: a bin may be wider than a step.

        Args:
            scale: [N, K] steps.
            zero_point: [N, K] codes of zero.
            number_format: the grid.
            p: the exponent.

        Returns:
            [N, K] float64.
        """
        edges, counts = self.filled()
        scale, zero_point = scale.double(), zero_point.double()
        total = counts.sum(1).clamp(min=1)
        chunk = max(1, _CHUNK // max(1, edges.numel() * scale.shape[1]))
        errors = [
            (_bin_errors(edges, s, z, number_format, p) * counts).sum(-1) / total
            for s, z in zip(scale.split(chunk), zero_point.split(chunk), strict=True)
        ]
        return torch.cat(errors)


def _bin_errors(edges: Tensor, scale: Tensor, zero_point: Tensor, number_format: Format, p: float) -> Tensor:
    """[N, K, B] mean error within each bin, for grids [N, K]."""
    scale, zero_point = scale[..., None], zero_point[..., None]
    left, right = edges.unbind(1)
    width = right - left
    if number_format.floating:
        points = (torch.arange(_POINTS, dtype=edges.dtype) + 0.5) / _POINTS
        x = left[:, None] + width[:, None] * points
        hat = to_grid(x.float(), scale[..., None].float(), zero_point[..., None], number_format)
        return (hat - x).abs().pow(p).mean(-1)
    low, high = ((q - zero_point) * scale for q in (number_format.qmin, number_format.qmax))
    integral = _integral(right, scale, low, high, p) - _integral(left, scale, low, high, p)
    middle = (left + right) / 2
    nearest = torch.minimum(torch.maximum((middle / scale).round() * scale, low), high)
    point = (middle - nearest).abs().pow(p)
    return torch.where(width > 0, integral / width.clamp(min=torch.finfo(width.dtype).tiny), point)


def _integral(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, p: float) -> Tensor:
    """``integral from 0 to x of |y - y_hat|**p dy`` for a grid of multiples of ``scale`` from ``low`` to ``high``."""
    inside = torch.minimum(torch.maximum(x, low), high)
    steps = inside / scale
    nearest = steps.round()
    rest = steps - nearest
    period = 2 * 0.5 ** (p + 1)
    within = (nearest * period + rest.sign() * rest.abs().pow(p + 1)) * scale.pow(p + 1)
    beyond = x - inside
    integral: Tensor = (within + beyond.sign() * beyond.abs().pow(p + 1)) / (p + 1)
    return integral
