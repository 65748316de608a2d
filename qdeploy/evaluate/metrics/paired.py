"""The common part of metrics of image pairs: a value for each pair, their mean and its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.intervals import CONFIDENCE, of_mean, rounded
from qdeploy.evaluate.metric_context import PAIRED
from qdeploy.evaluate.metrics.base import MergingMeter
from qdeploy.evaluate.paired_sample import Pair

Compare = Callable[[Tensor, Tensor], Sequence[float]]


def about_mean(values: Sequence[float], digits: int, **more: Any) -> dict[str, Any]:
    """A mean for a report: its interval, what it is compared with, and of how many images."""
    return {
        "mean": round(sum(values) / len(values), digits),
        "interval": rounded(of_mean(values), digits),
        "confidence": CONFIDENCE,
        "count": len(values),
        "reference": PAIRED,
        **more,
    }


def compared(compare: Compare, pair: Pair) -> Tensor:
    """A value for each image of a pair [N], float32: enough for the digits of a report, in half the space."""
    return pair.once(compare, lambda: torch.tensor(compare(pair.images, pair.expected_images)))


class PairedMeter(MergingMeter):
    """Compares images pair by pair.

    Args:
        compare: a value for each pair of images, of batches [N, C, H, W] in [0, 1].
        digits: decimals of the report.
    """

    def __init__(self, compare: Compare, digits: int, **more: Any) -> None:
        self._compare, self._digits, self._more = compare, digits, more
        self._values: list[float] = []

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        return {"values": compared(self._compare, pair)}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        self._values += observed["values"].tolist()

    def result(self) -> dict[str, Any]:
        return about_mean(self._values, self._digits, **self._more)
