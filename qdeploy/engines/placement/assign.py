"""Which quantizers to keep: the most time saved within an allowance of error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from qdeploy.engines.base import Kernel
from qdeploy.engines.int8_share import multiplies
from qdeploy.engines.placement.switches import Switch
from qdeploy.system.decibels import decibels


def least(looks: Sequence[Kernel]) -> Kernel:
    """A kernel with the shortest of its measured times."""
    times = [kernel.ms for kernel in looks if kernel.ms is not None]
    return replace(looks[0], ms=min(times) if times else None)


def times_by_product(kernels: Sequence[Kernel], products: Mapping[str, int]) -> dict[str, float]:
    """Time of each product in ms; a kernel that computes several of them is shared out by their MACs.

    Args:
        kernels: with times.
        products: MACs by name.
    """
    times = dict.fromkeys(products, 0.0)
    for kernel in kernels:
        mine = [name for name in kernel.layers if name in products]
        if kernel.ms is None or not mine or not multiplies(kernel):
            continue
        total = sum(products[name] for name in mine)
        for name in mine:
            times[name] += kernel.ms * (products[name] / total if total else 1 / len(mine))
    return times


def quantizing_times(kernels: Sequence[Kernel], switches: Sequence[Switch]) -> list[float]:
    """Time in ms of the kernels that only quantize, by switch."""
    times = []
    for switch in switches:
        names = set(switch.nodes)
        own = (kernel for kernel in kernels if kernel.layers and names.issuperset(kernel.layers))
        times.append(sum(kernel.ms or 0.0 for kernel in own))
    return times


def keep_within(gains: Sequence[float], noises: Sequence[float], allowance: float | None) -> list[bool]:
    """The quantizers to keep: a 0-1 knapsack, solved exactly.

    Args:
        gains: what each saves, in ms; those that save nothing are never kept.
        noises: the error that each causes, in any unit that adds up.
        allowance: how much error they may cause together; None for any amount. Below 0, only those that cause
            none are kept.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    worth = [gain > 0 for gain in gains]
    if allowance is None or not any(worth):
        return worth
    scale = max(noises) or 1.0
    solution = milp(
        -np.asarray(gains) / max(gains),
        integrality=np.ones(len(gains)),
        bounds=Bounds(0, np.asarray(worth, float)),
        constraints=LinearConstraint(np.asarray(noises)[None] / scale, ub=max(allowance, 0.0) / scale),
    )
    return [bool(x > 0.5) for x in solution.x]


@dataclass(frozen=True)
class Noise:
    """The error that each quantizer alone causes in the prediction.

    Attributes:
        signal: power of the full-precision prediction, by row.
        base: power of the error without any quantizer, by row.
        noises: power of each quantizer's error, by quantizer and row.
    """

    signal: list[float]
    base: list[float]
    noises: list[list[float]]

    def alone_db(self, index: int) -> float:
        """SQNR with one quantizer and nothing else wrong."""
        kept = [here == index for here in range(len(self.noises))]
        return self._expected(kept, [0.0] * len(self.signal))

    def choose(self, gains: Sequence[float], aim: float | None) -> list[bool]:
        """The placement that saves most time, and is expected to reach ``aim`` dB."""
        kept = keep_within(gains, self._relative(), None)
        if aim is None or self._expected(kept) >= aim:
            return kept
        low, high = 0.0, sum(self._relative())
        for _ in range(30):  # halve the allowance's interval
            middle = (low + high) / 2
            kept = keep_within(gains, self._relative(), middle)
            low, high = (middle, high) if self._expected(kept) >= aim else (low, middle)
        return keep_within(gains, self._relative(), low)

    def _relative(self) -> list[float]:
        return [
            sum(noise / signal for noise, signal in zip(row, self.signal, strict=True) if signal)
            for row in self.noises
        ]

    def _expected(self, kept: Sequence[bool], base: Sequence[float] | None = None) -> float:
        """Median SQNR in dB over rows, if errors add up."""
        rows = []
        for row, power in enumerate(self.signal):
            added = sum(noise[row] for noise, here in zip(self.noises, kept, strict=True) if here)
            rows.append(decibels(power, (self.base if base is None else base)[row] + added))
        return median(rows)
