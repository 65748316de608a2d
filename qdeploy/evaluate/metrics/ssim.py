"""Structural similarity of images that were sampled from the same seeds (Wang et al. 2004, equation 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.paired import PairedMeter
from qdeploy.model.folder import Model

WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 for values in [0, 1]


def ssim(images: Tensor, expected: Tensor) -> list[float]:
    """Mean SSIM over channels and over the places where the window fits, of each image; 1 for equal ones.

    The window is a Gaussian of 11 pixels with a deviation of 1.5, cut to odd sizes that fit small images.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        expected: images of the same shape.
    """
    x, y = images.double(), expected.double()
    channels, size = x.shape[1], min(WINDOW, *x.shape[2:])
    offsets = torch.arange(size - (size + 1) % 2, dtype=torch.float64)
    bell = torch.exp(-((offsets - (len(offsets) - 1) / 2) ** 2) / (2 * SIGMA**2))
    bell = bell / bell.sum()
    window = torch.outer(bell, bell).expand(channels, 1, -1, -1).to(x.device)

    def local(values: Tensor) -> Tensor:
        return nn.functional.conv2d(values, window, groups=channels)

    mean_x, mean_y = local(x), local(y)
    spread_x, spread_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    together = local(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + _C1) * (2 * together + _C2)
    below = (mean_x**2 + mean_y**2 + _C1) * (spread_x + spread_y + _C2)
    values: list[float] = (above / below).flatten(1).mean(1).tolist()
    return values


def _start(model: Model) -> PairedMeter:
    return PairedMeter(ssim, 4)


METRIC = Metric("ssim", "structural similarity of images on the same seeds", _start)
