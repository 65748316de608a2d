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
_BLOCK = 2**24  # distances that are held at a time
_SPARE = 4  # neighbours more than are asked for, from which rounding cannot keep the right ones
_ROUNDING = 1e-11  # of matrix products, by the largest squared norms


def share_within(features: Tensor, balls: Tensor, neighbour: int = NEIGHBOUR) -> tuple[int, int]:
    """How many features [N, D] are within some ball about ``balls`` [M, D], and N.

    Matrix products find who is near; distances that decide are computed from differences.
    """
    x, centres = features.double(), balls.double()
    squares = centres.square().sum(1)
    rows = max(1, _BLOCK // len(centres))
    near = min(len(centres), neighbour + 1 + _SPARE)
    radii = []
    for part in centres.split(rows):
        found = _squared(part, centres, squares).topk(near, largest=False).indices
        radii.append(_distances(part, centres, found).kthvalue(neighbour + 1).values)
    radius = torch.cat(radii)
    within = 0
    for part in x.split(rows):
        beyond = _squared(part, centres, squares).sub_(radius.square())
        doubt = _ROUNDING * (float(squares.max()) + float(part.square().sum(1).max()))
        sure = (beyond < -doubt).any(1)
        within += int(sure.sum())
        for row in (~sure).nonzero().flatten().tolist():
            close = (beyond[row] <= doubt).nonzero().flatten()
            within += bool((_distances(part[row : row + 1], centres, close[None])[0] <= radius[close]).any())
    return within, len(x)


def _squared(x: Tensor, y: Tensor, squares: Tensor) -> Tensor:
    """Squared distances [N, M], but for rounding; ``squares`` are the squared norms of ``y``."""
    return (x @ y.T).mul_(-2).add_(x.square().sum(1, keepdim=True)).add_(squares)


def _distances(x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """Distances of each x [N, D] to the y that are chosen for it [N, K]."""
    return (x[:, None] - y[chosen]).square().sum(2).sqrt()


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
