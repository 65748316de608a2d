"""KID: the kernel distance of two sets of images in a feature space (Bińkowski et al. 2018).

Unlike Fréchet distances it has no bias from the number of images: distances of differently many may be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.evaluate.intervals import Interval, groups_of, of_left_out
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter

_BLOCK = 2048


def kid(one: Tensor, other: Tensor, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)^3, over all features [N, D] and [M, D].

    Published values are means over subsets of 1000; this is what they scatter about.

    Args:
        one: features of a set.
        other: of another.
        paired: images of the same number are similar, as from the same seeds. Such pairs are left out of the cross
            term, as each image is left out of its own set's (Gretton et al. 2012, equation 4); equal sets are
            then at distance 0.
    """
    return KernelSums(one, other, paired).distance()


class KernelSums:
    """The kernel's sums over groups of images, from which the distance of any of the groups follows.

    Image i is in group i modulo their number, as `qdeploy.evaluate.intervals.of_statistic` has it.

    Args:
        one: features [N, D] of a set.
        other: features [M, D] of another.
        paired: see `kid`.
        groups: of the first set; of the second as many where sets are paired, else one.
    """

    def __init__(self, one: Tensor, other: Tensor, paired: bool = False, groups: int = 1) -> None:
        self._paired = paired
        x = [one.double()[group::groups] for group in range(groups)]
        y = [other.double()[group::groups] for group in range(groups)] if paired else [other.double()]
        self._counts = [torch.tensor([len(part) for part in side]) for side in (x, y)]
        self._within = [_symmetric(x), _symmetric(y)]
        self._own = [_pairs(x, x), _pairs(y, y)]
        self._cross = torch.tensor([[_sum(a, b) for b in y] for a in x], dtype=torch.float64)
        self._left_out = _pairs(x, y) if paired else torch.zeros(groups, dtype=torch.float64)

    def distance(self, without: int | None = None) -> float:
        """The squared distance.

        Args:
            without: a group that is left out, of both sets where they are paired.
        """
        rows = torch.tensor([group for group in range(len(self._own[0])) if group != without])
        columns = rows if self._paired else torch.arange(1)
        total = 0.0
        for counts, within, own, kept in zip(
            self._counts, self._within, self._own, (rows, columns), strict=True
        ):
            count = int(counts[kept].sum())
            total += float(within[kept][:, kept].sum() - own[kept].sum()) / (count * (count - 1))
        n, m = int(self._counts[0][rows].sum()), int(self._counts[1][columns].sum())
        cross = float(self._cross[rows][:, columns].sum() - self._left_out[rows].sum())
        return total - 2 * cross / (n * (n - 1) if self._paired else n * m)


def _symmetric(parts: list[Tensor]) -> Tensor:
    """The kernel's sums over each two groups of a set."""
    sums = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for row, a in enumerate(parts):
        for column, b in enumerate(parts[: row + 1]):
            sums[row, column] = sums[column, row] = _sum(a, b)
    return sums


def _pairs(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """The kernel's sums over images of the same number, by group."""
    sums = [float(((a * b).sum(1) / a.shape[1] + 1).pow(3).sum()) for a, b in zip(x, y, strict=True)]
    return torch.tensor(sums, dtype=torch.float64)


def _sum(x: Tensor, y: Tensor) -> float:
    """The sum over the kernel's matrix, of which only blocks are held."""
    total = 0.0
    for a in x.split(_BLOCK):
        for b in y.split(_BLOCK):
            base = (a @ b.T).div_(x.shape[1]).add_(1)
            total += float((base * base).mul_(base).sum())
    return total


class KidMeter(SetMeter):
    """The distance, and its interval from sums over groups: the kernel is computed once."""

    def __init__(self, context: MetricContext) -> None:
        self._paired = context.real is None

        def distance(one: Tensor, other: Tensor) -> float:
            return kid(one, other, self._paired)

        super().__init__(context, "pooled", distance, "KID", digits=6)

    def with_interval(self, made: Tensor, against: Tensor) -> tuple[float, Interval | None]:
        groups = groups_of(len(made))
        if groups < 2:
            return self._distance(made, against), None
        sums = KernelSums(made, against, self._paired, groups)
        whole = sums.distance()
        return whole, of_left_out(whole, [sums.distance(without=group) for group in range(groups)])


def _begin(context: MetricContext) -> SetMeter | None:
    return KidMeter(context) if context.extractor else None


METRIC = Metric("kid", "kernel distance of sets of images in a feature space", begin=_begin)
