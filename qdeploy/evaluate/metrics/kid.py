"""KID: the kernel distance of two sets of images in a feature space (Bińkowski et al. 2018).

Unlike Fréchet distances it has no bias from the number of images: distances of differently many may be compared.
"""

from __future__ import annotations

from torch import Tensor

from qdeploy.evaluate.means import Means
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.distribution import SetMeter

_BLOCK = 2048


def kid(one: Tensor, other: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y / D + 1)^3, over all features [N, D] and [M, D].

    Published values are means over subsets of 1000; this is what they scatter about.
    """
    x, y = one.double(), other.double()
    return _within(x) + _within(y) - 2 * _sum(x, y) / (len(x) * len(y))


def _within(x: Tensor) -> float:
    own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return (_sum(x, x) - float(own)) / (len(x) * (len(x) - 1))


def _sum(x: Tensor, y: Tensor) -> float:
    """The sum over the kernel's matrix, of which only blocks are held."""
    return sum(float((part @ y.T / x.shape[1] + 1).pow(3).sum()) for part in x.split(_BLOCK))


def _begin(means: Means) -> SetMeter | None:
    return SetMeter(means, "pooled", kid, "KID", digits=6) if means.extractor else None


METRIC = Metric("kid", "kernel distance of sets of images in a feature space", begin=_begin)
