"""Signal-to-quantization-noise ratio of the prediction, timestep by timestep.

Both networks get the same inputs, those of the reference's trajectory: what is measured is the error that one
call adds, not what earlier calls have led to. SQNR = 10 log10(||y||^2 / ||y - y'||^2).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import Model
from qdeploy.system.decibels import decibels, powers


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


class SqnrMeter(MergingMeter):
    """Sums powers over batches, so that the result does not depend on how rows are batched."""

    def __init__(self) -> None:
        self._powers: dict[float, tuple[float, float]] = {}

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        rows = [(call.timestep, *powers(call.predicted, call.expected)) for call in pair.calls]
        return {"powers": torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        for t, signal, noise in observed["powers"].tolist():
            before = self._powers.get(t, (0.0, 0.0))
            self._powers[t] = (before[0] + signal, before[1] + noise)

    def result(self) -> dict[str, Any]:
        return summary({t: decibels(*sums) for t, sums in self._powers.items()})


def _start(model: Model) -> SqnrMeter:
    return SqnrMeter()


METRIC = Metric("sqnr_db", "SQNR of the prediction on the reference's own trajectory, by timestep", _start)
