"""FD-local: the Fréchet distance between images, in the feature space of a small local network.

It is no FID. FID means Inception-v3 features and nothing else, and the two cannot be compared. Like FID it
falls with the number of images, so only distances of equally many images may be compared: the count is
always reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.features import FeatureNetwork
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.paired_sample import Pair

STATISTICS = "statistics.safetensors"
FOLDER = "features"
_BATCH = 256


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and covariance ``[D, D]`` of ``count`` feature vectors, in double precision."""

    mean: Tensor
    covariance: Tensor
    count: int


def gaussian(features: Tensor) -> Gaussian:
    """The Gaussian of feature vectors ``[N, D]``; its covariance is the unbiased one."""
    values = features.double()
    return Gaussian(values.mean(0), torch.cov(values.T).reshape(values.shape[1], -1), len(values))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    d^2 = ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the roots of the
    eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no complex roots, and covariances of fewer
    samples than dimensions need no special care.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    means = (one.mean - other.mean).square().sum()
    return max(0.0, float(means + one.covariance.trace() + other.covariance.trace() - 2 * cross))


def real_images(folder: Path) -> Gaussian:
    """The statistics of the real images that are shipped with a feature network."""
    from safetensors.torch import load_file

    stored = load_file(folder / STATISTICS)
    return Gaussian(stored["mean"].double(), stored["covariance"].double(), int(stored["count"]))


def features_of(images: Tensor, network: FeatureNetwork) -> Tensor:
    """Feature vectors ``[N, D]`` of images ``[N, C, H, W]``, uint8 or float in [0, 1]."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    with torch.no_grad():
        return torch.cat([network.features(part * 2 - 1) for part in torch.split(images, _BATCH)])


def fd_local(images: Tensor, folder: Path) -> dict[str, Any]:
    """FD-local between images and the real ones.

    Args:
        images: ``[N, C, H, W]``, uint8 or float in [0, 1].
        folder: the feature network and its ``statistics.safetensors``.

    Returns:
        ``fd_local`` and the numbers of images on both sides.
    """
    real = real_images(folder)
    made = gaussian(features_of(images, FeatureNetwork.load(folder)))
    return {"fd_local": round(frechet_distance(made, real), 4), "count": made.count, "real_count": real.count}


class FrechetMeter(MergingMeter):
    """Keeps feature vectors of both sides' images.

    Args:
        folder: the feature network with its statistics.
        context: where the same network's features of a pair are found, if it is the one that other metrics use.
    """

    def __init__(self, folder: Path, context: MetricContext | None = None) -> None:
        self._network, self._real = FeatureNetwork.load(folder), real_images(folder)
        self._context = context
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        if self._context is not None:
            expected, made = (features.pooled for features in self._context.of(pair))
        else:
            expected, made = (
                features_of(images, self._network) for images in (pair.expected_images, pair.images)
            )
        return {"expected": expected, "made": made}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        for kept, name in zip(self._features, ("expected", "made"), strict=True):
            kept.append(observed[name])

    def result(self) -> dict[str, Any] | None:
        if sum(map(len, self._features[0])) < 2:
            return None  # one image has no covariance
        made = [gaussian(torch.cat(kept)) for kept in self._features]
        reference, subject = (frechet_distance(side, self._real) for side in made)
        return {
            "reference": round(reference, 4),
            "subject": round(subject, 4),
            "increase": round(subject - reference, 4),
            "between": round(frechet_distance(*made), 4),
            "count": made[1].count,
            "real_count": self._real.count,
        }


def _begin(context: MetricContext) -> FrechetMeter | None:
    folder = context.model.path / FOLDER
    if not (folder / STATISTICS).is_file():
        return None
    return FrechetMeter(folder, context if context.features is None else None)


METRIC = Metric("fd_local", "Fréchet distance to real images in a local feature space; no FID", begin=_begin)
