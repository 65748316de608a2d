"""The inception score: how sure a classifier is of each image, and how many classes it sees (Salimans et al. 2016).

It has no reference; the full-precision model's own score is reported too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qdeploy.evaluate.intervals import CONFIDENCE, of_statistic, rounded
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class); from 1 to the number of classes.

    Args:
        logits: [N, C], all in one split.
    """
    logs = logits.double().log_softmax(1)
    marginal = logs.exp().mean(0).log()
    return float((logs.exp() * (logs - marginal)).sum(1).mean().exp())


class InceptionScoreMeter(SetMeter):
    """The subject's score and the reference's."""

    def __init__(self, context: MetricContext) -> None:
        super().__init__(context, "logits", lambda one, other: 0.0, "IS")

    def result(self) -> dict[str, Any] | None:
        expected, made = self.sides()
        if len(made) < 2:
            return None
        return {
            "called": self.context.called(self._name),
            "value": round(inception_score(made), 4),
            "interval": rounded(
                of_statistic(lambda rows: inception_score(made[rows]), len(made)), 4, least=1
            ),
            "confidence": CONFIDENCE,
            "of_the_reference": round(inception_score(expected), 4),
            **self.context.description(len(made)),
            "reference": "none: a score of the images alone",
        }


def _begin(context: MetricContext) -> InceptionScoreMeter | None:
    return InceptionScoreMeter(context) if context.extractor else None


METRIC = Metric("inception_score", "how sure a classifier is, and of how many classes", begin=_begin)
