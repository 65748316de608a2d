"""Signal-to-quantization-noise ratio of the prediction, timestep by timestep.

Both networks get the same inputs, those of the reference's trajectory: what is measured is the error that one
call adds, not what earlier calls have led to. SQNR = 10 log10(||y||^2 / ||y - y'||^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from qdeploy.denoiser import Model
from qdeploy.evaluate.metrics.base import EXACT_DB, Metric, Pair


def powers(output: Tensor, expected: Tensor) -> tuple[float, float]:
    """Sums of squares of the signal and of the noise, in double precision."""
    signal, noise = expected.double(), output.double() - expected.double()
    return float(signal.square().sum()), float(noise.square().sum())


def decibels(signal: float, noise: float) -> float:
    """Their ratio in dB, within +-`EXACT_DB`: 200 for equality, also where there is neither."""
    if noise == 0:
        return EXACT_DB
    ratio = signal / noise
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(ratio))) if ratio > 0 else -EXACT_DB


def sqnr_db(output: Tensor, expected: Tensor) -> float:
    """SQNR over all elements together, in dB; 200 where the two are equal."""
    return decibels(*powers(output, expected))


def sqnr_by_row(output: Tensor, expected: Tensor) -> list[float]:
    """SQNR of every row of ``[rows, ...]``, in dB."""
    return [sqnr_db(one, other) for one, other in zip(output, expected, strict=True)]


def summary(by_timestep: Mapping[float, float]) -> dict[str, Any]:
    """Median, worst and all values; timesteps ascend, and are written without needless decimals."""
    values = {timestep_name(t): round(by_timestep[t], 2) for t in sorted(by_timestep)}
    return {
        "median": round(median(by_timestep.values()), 2),
        "worst": round(min(by_timestep.values()), 2),
        "by_timestep": values,
    }


def timestep_name(t: float) -> str:
    """``999`` for 999.0, ``999.5`` as it is."""
    return str(int(t)) if float(t).is_integer() else str(t)


class SqnrMeter:
    """Sums powers over batches, so that the result does not depend on how rows are batched."""

    def __init__(self) -> None:
        self._powers: dict[float, tuple[float, float]] = {}

    def add(self, pair: Pair) -> None:
        for call in pair.calls:
            signal, noise = powers(call.predicted, call.expected)
            before = self._powers.get(call.timestep, (0.0, 0.0))
            self._powers[call.timestep] = (before[0] + signal, before[1] + noise)

    def result(self) -> dict[str, Any]:
        return summary({t: decibels(*sums) for t, sums in self._powers.items()})


def _start(model: Model) -> SqnrMeter:
    return SqnrMeter()


METRIC = Metric("sqnr_db", "SQNR of the prediction on the reference's own trajectory, by timestep", _start)
