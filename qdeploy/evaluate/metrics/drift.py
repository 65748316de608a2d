"""How far a trajectory drifts from the reference's when both begin with the same noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.metrics.sqnr import timestep_name
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import Model
from qdeploy.system.decibels import powers


def drift(sample: Tensor, expected: Tensor) -> float:
    """Relative distance ||x_t - x'_t|| / ||x_t||; 0 for equal trajectories."""
    signal, noise = powers(sample, expected)
    return _ratio(signal, noise)


def _ratio(signal: float, noise: float) -> float:
    return math.sqrt(noise / signal) if signal else 0.0


class DriftMeter(MergingMeter):
    """Sums powers for each call of the trajectory, in the order of sampling."""

    def __init__(self) -> None:
        self._powers: list[tuple[float, float, float]] = []

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        rows = [(call.timestep, *powers(call.sample, call.expected_sample)) for call in pair.calls]
        return {"powers": torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        rows = observed["powers"].tolist()
        if not self._powers:
            self._powers = [(t, 0.0, 0.0) for t, _, _ in rows]
        for number, (_, signal, noise) in enumerate(rows):
            t, signals, noises = self._powers[number]
            self._powers[number] = (t, signals + signal, noises + noise)

    def result(self) -> dict[str, Any]:
        ratios = [(timestep_name(t), round(_ratio(signal, noise), 6)) for t, signal, noise in self._powers]
        return {
            "final": ratios[-1][1],
            "worst": max(ratio for _, ratio in ratios),
            "by_timestep": dict(ratios),
        }


def _start(model: Model) -> DriftMeter:
    return DriftMeter()


METRIC = Metric("drift", "relative distance of x_t from the reference's trajectory, by timestep", _start)
