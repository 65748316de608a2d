"""The common part of metrics of sets of images: features of all images, against real ones or the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from qdeploy.evaluate.extractors import Features
from qdeploy.evaluate.intervals import CONFIDENCE, Interval, of_statistic, rounded
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import MergingMeter
from qdeploy.evaluate.paired_sample import Pair

Distance = Callable[[Tensor, Tensor], float]


class SetMeter(MergingMeter):
    """Collects one kind of features and compares sets at the end.

    With real images, the subject's and the reference's distances to them are reported; without, the subject's
    distance to the reference's images.

    Args:
        context: where features come from.
        part: ``pooled``, ``spatial`` or ``logits``.
        distance: between features [N, D] of the subject and [M, D] of what it is compared with.
        name: of the metric where features are Inception's.
        digits: decimals of the report.
        least: what the distance can never be below.
    """

    def __init__(
        self,
        context: MetricContext,
        part: str,
        distance: Distance,
        name: str,
        digits: int = 4,
        least: float = -math.inf,
    ) -> None:
        self._least = least
        self.context, self._part, self._distance = context, part, distance
        self._name, self._digits = name, digits
        self._kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._checked = False

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        if not self._checked:
            self.context.check_size(pair)
            self._checked = True
        expected, made = self.context.of(pair)
        return {"expected": self._chosen(expected), "made": self._chosen(made)}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        for kept, name in zip(self._kept, ("expected", "made"), strict=True):
            kept.append(observed[name])

    def _chosen(self, features: Features) -> Tensor:
        return features.tensors()[self._part]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Features of the reference's images and of the subject's, [N, D] each."""
        import torch

        return torch.cat(self._kept[0]), torch.cat(self._kept[1])

    def with_interval(self, made: Tensor, against: Tensor) -> tuple[float, Interval | None]:
        """The distance of two sets and its jackknife's interval: seeds that both sides have are left out on both."""

        def without(rows: Tensor) -> float:
            return self._distance(made[rows], against[rows] if self.context.real is None else against)

        return self._distance(made, against), of_statistic(without, len(made))

    def result(self) -> dict[str, Any] | None:
        expected, made = self.sides()
        if len(made) < 2:
            return None  # one image is no set
        real = self.context.real_features
        against = expected if real is None else self._chosen(real)

        distance, interval = self.with_interval(made, against)
        value = {
            "called": self.context.called(self._name),
            "value": round(distance, self._digits),
            "interval": rounded(interval, self._digits, self._least),
            "confidence": CONFIDENCE,
            **self.context.description(len(made)),
        }
        if real is not None:
            value["of_the_reference"] = round(self._distance(expected, against), self._digits)
        return value
