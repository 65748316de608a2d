"""Precision and recall of a set of images: how much of it is real, how much of what is real it has.

Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2): a set is taken for the union of balls
about its features, each as wide as the distance to the third neighbour.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.intervals import CONFIDENCE, of_share, rounded
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter

NEIGHBOUR = 3
_BLOCK = 4096


def share_within(features: Tensor, balls: Tensor, neighbour: int = NEIGHBOUR) -> tuple[int, int]:
    """How many features [N, D] are within some ball about ``balls`` [M, D], and N."""
    x, centres = features.double(), balls.double()
    radii = torch.cat(
        [_distances(part, centres).kthvalue(neighbour + 1).values for part in centres.split(_BLOCK)]
    )
    within = sum(int((_distances(part, centres) <= radii).any(1).sum()) for part in x.split(_BLOCK))
    return within, len(x)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class PrecisionRecallMeter(SetMeter):
    """Both shares at the end, with Wilson's intervals: the balls are taken as given."""

    def __init__(self, context: MetricContext) -> None:
        super().__init__(context, "pooled", lambda one, other: 0.0, "precision and recall")

    def result(self) -> dict[str, Any] | None:
        expected, made = self.sides()
        real = self.context.real_features
        against = expected if real is None else real.pooled
        if min(len(made), len(against)) <= NEIGHBOUR:
            return None
        value: dict[str, Any] = {"called": self.context.called(self._name)}
        for name, pair in {"precision": (made, against), "recall": (against, made)}.items():
            hits, count = share_within(*pair)
            value[name] = {"value": round(hits / count, 4), "interval": rounded(of_share(hits, count), 4)}
        return {
            **value,
            "confidence": CONFIDENCE,
            "neighbour": NEIGHBOUR,
            **self.context.description(len(made)),
        }


def _begin(context: MetricContext) -> PrecisionRecallMeter | None:
    return PrecisionRecallMeter(context) if context.extractor else None


METRIC = Metric("precision_recall", "how much is within the reference set, and the reverse", begin=_begin)
