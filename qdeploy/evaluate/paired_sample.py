"""Paired samples, the input of metrics.

Two denoisers sample from the same seeds: the reference in full precision, and the subject.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_T = TypeVar("_T")
_PARTS = ("expected", "predicted", "expected_sample", "sample")


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
    _found: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: object, compute: Callable[[], _T]) -> _T:
        """What several metrics take from the pair, computed at its first use."""
        if key not in self._found:
            self._found[key] = compute()
        return cast(_T, self._found[key])


def tensors_of(pair: Pair) -> dict[str, Tensor]:
    """A pair as tensors by name: `read_pair` reads it."""
    tensors = {"images": pair.images, "expected_images": pair.expected_images}
    for number, call in enumerate(pair.calls):
        tensors |= {f"{number:04d}.{part}": getattr(call, part) for part in _PARTS}
    # Tensors that share memory, or parts of larger ones, cannot be stored as they are.
    stored = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    stored["timesteps"] = torch.tensor([call.timestep for call in pair.calls], dtype=torch.float64)
    if pair.prompts is not None:
        words = "\0".join(pair.prompts).encode()
        stored["prompts"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    return stored


def read_pair(stored: Mapping[str, Tensor]) -> Pair:
    """The pair that `tensors_of` wrote."""
    calls = [
        Call(t, *(stored[f"{number:04d}.{part}"] for part in _PARTS))
        for number, t in enumerate(stored["timesteps"].tolist())
    ]
    words = stored.get("prompts")
    prompts = None if words is None else bytes(words.tolist()).decode().split("\0")
    return Pair(calls, stored["expected_images"], stored["images"], prompts)
