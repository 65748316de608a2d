"""Peak signal-to-noise ratio of images that were sampled from the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from qdeploy.evaluate.metrics.base import MergingMeter, Metric
from qdeploy.evaluate.metrics.paired import PairedMeter, compared
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import Model

# 8-bit images that are equal but for rounding are about 59 dB apart; the mean must not depend on a few equal ones.
EQUAL_DB = 100.0


def psnr_db(images: Tensor, expected: Tensor) -> list[float]:
    """PSNR = 10 log10(1 / mean squared difference) of each image, in dB, at most 100.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        expected: images of the same shape.
    """
    errors = (images.double() - expected.double()).square().flatten(1).mean(1).tolist()
    return [min(EQUAL_DB, -10 * math.log10(error)) if error > 0 else EQUAL_DB for error in errors]


class PsnrMeter(MergingMeter):
    """Mean over images, as is usual."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def observe(self, pair: Pair) -> dict[str, Tensor]:
        return {"values": compared(psnr_db, pair)}

    def merge(self, observed: Mapping[str, Tensor]) -> None:
        self._values += observed["values"].tolist()

    def result(self) -> float:
        return round(sum(self._values) / len(self._values), 2)


def _start(model: Model) -> PsnrMeter:
    return PsnrMeter()


def _start_interval(model: Model) -> PairedMeter:
    return PairedMeter(psnr_db, 2, unit="dB")


METRICS = (
    Metric("psnr_db", "PSNR of images on the same seeds, mean over images", _start),
    Metric("psnr", "mean PSNR of images on the same seeds, with its confidence interval", _start_interval),
)
