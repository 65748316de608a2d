"""Paired samples, the input of metrics.

Two denoisers sample from the same seeds: the reference in full precision, and the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One denoiser call of the reference's trajectory, and the subject's prediction for the same inputs.

    Attributes:
        timestep: the t that the network is given.
        expected: the reference's prediction, ``[rows, ...]``.
        predicted: the subject's prediction for the same inputs.
        expected_sample: x_t of the reference, ``[rows, ...]``.
        sample: x_t of the subject, whose own trajectory began with the same noise.
    """

    timestep: float
    expected: Tensor
    predicted: Tensor
    expected_sample: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Pair:
    """A batch of images and the trajectories to them.

    Attributes:
        calls: denoiser calls, in the order of sampling.
        expected_images: the reference's images, ``[N, C, H, W]`` in [0, 1].
        images: the subject's, from the same seeds.
        prompts: of the images, where the model takes prompts.
    """

    calls: Sequence[Call]
    expected_images: Tensor
    images: Tensor
    prompts: Sequence[str] | None = None
