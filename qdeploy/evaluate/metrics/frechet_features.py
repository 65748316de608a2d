"""FID and sFID with Inception's features; with a local network's, distances of other names.

sFID is the same distance in an inner layer's features at every place, which sees the arrangement of things
(Nash et al. 2021, section 4).
"""

from __future__ import annotations

from torch import Tensor

from qdeploy.evaluate.extractors import INCEPTION
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter
from qdeploy.evaluate.metrics.frechet import frechet_distance, gaussian


def frechet(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians of features [N, D] and [M, D]."""
    return frechet_distance(gaussian(one), gaussian(other))


def _fid(context: MetricContext) -> SetMeter | None:
    with_inception = context.extractor is not None and context.extractor.name == INCEPTION
    return SetMeter(context, "pooled", frechet, "FID", least=0) if with_inception else None


def _sfid(context: MetricContext) -> SetMeter | None:
    return SetMeter(context, "spatial", frechet, "sFID", least=0) if context.extractor else None


METRICS = (
    Metric("fid", "Fréchet distance with Inception's features, and with no others", begin=_fid),
    Metric("spatial_frechet", "Fréchet distance of features at every place: sFID", begin=_sfid),
)
