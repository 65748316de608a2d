"""KID: the kernel distance of two sets of images in a feature space (Bińkowski et al. 2018).

Unlike Fréchet distances it has no bias from the number of images: distances of differently many may be compared.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter

_BLOCK = 2048


def kid(one: Tensor, other: Tensor, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)^3, over all features [N, D] and [M, D].

    Published values are means over subsets of 1000; this is what they scatter about.

    Args:
        one: features of a set.
        other: of another.
        paired: images of the same number are similar, as from the same seeds. Such pairs are left out of the cross
            term, as each image is left out of its own set's (Gretton et al. 2012, equation 4); equal sets are
            then at distance 0.
    """
    x, y = one.double(), other.double()
    left_out, pairs = (_pairs(x, y), len(x) * (len(x) - 1)) if paired else (0.0, len(x) * len(y))
    cross = (_sum(x, y) - left_out) / pairs
    return _within(x) + _within(y) - 2 * cross


def _within(x: Tensor) -> float:
    return (_sum(x, x) - _pairs(x, x)) / (len(x) * (len(x) - 1))


def _pairs(x: Tensor, y: Tensor) -> float:
    return float(((x * y).sum(1) / x.shape[1] + 1).pow(3).sum())


def _sum(x: Tensor, y: Tensor) -> float:
    """The sum over the kernel's matrix, of which only blocks are held."""
    return sum(float((part @ y.T / x.shape[1] + 1).pow(3).sum()) for part in x.split(_BLOCK))


def _begin(context: MetricContext) -> SetMeter | None:
    if context.extractor is None:
        return None
    return SetMeter(context, "pooled", partial(kid, paired=context.real is None), "KID", digits=6)


METRIC = Metric("kid", "kernel distance of sets of images in a feature space", begin=_begin)
