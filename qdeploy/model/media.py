"""What pipelines make: images, videos, sounds, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from qdeploy.system.errors import InvalidInputError

IMAGES, FRAMES, AUDIO, EMBEDDINGS, LATENTS = "images", "frames", "audio", "embeddings", "latents"
_FIELDS = {
    "images": IMAGES,
    "frames": FRAMES,
    "audios": AUDIO,
    "audio": AUDIO,
    "image_embeds": EMBEDDINGS,
    "image_embeddings": EMBEDDINGS,
}
RATE = 16_000  # samples a second, where a pipeline does not say


@dataclass(frozen=True)
class Media:
    """Results of one kind, one for each seed.

    Attributes:
        kind: ``images`` [N, C, H, W] in [0, 1]; ``frames`` [N, F, C, H, W] in [0, 1]; ``audio`` [N, channels,
            samples] in [-1, 1]; or ``embeddings`` [N, ...]; ``latents`` where nothing was decoded.
        values: float32.
    """

    kind: str
    values: Tensor

    @property
    def pictures(self) -> Tensor | None:
        """Images or single frames, ``[N, C, H, W]`` in [0, 1]; None if there are none to see."""
        if self.kind == FRAMES:
            return self.values.flatten(0, 1)
        return self.values if self.kind == IMAGES else None


def read_media(result: Any, where: str) -> Media:
    """The results among the fields of what a pipeline returned.

    Args:
        result: a pipeline's output, made with ``output_type="np"``.
        where: the pipeline, for messages.

    Raises:
        InvalidInputError: there is none of a known kind.
    """
    fields = result if isinstance(result, Mapping) else vars(result) if hasattr(result, "__dict__") else {}
    for name, kind in _FIELDS.items():
        if fields.get(name) is not None:
            values = _tensor(fields[name])
            if values is not None and (media := _of_kind(kind, values)) is not None:
                return media
    made, known = ", ".join(fields) or type(result).__name__, ", ".join(_FIELDS)
    raise InvalidInputError(f"{where} returns {made}, of which none is known: one of {known} is needed")


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().float().cpu()
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.astype(numpy.float32))
    if isinstance(value, list | tuple) and value:
        if hasattr(value[0], "convert"):  # PIL
            value = [numpy.asarray(image.convert("RGB"), dtype=numpy.float32) / 255 for image in value]
        parts = [_tensor(part) for part in value]
        if all(part is not None and parts[0] is not None and part.shape == parts[0].shape for part in parts):
            return torch.stack([part for part in parts if part is not None])
    return None


def _of_kind(kind: str, values: Tensor) -> Media | None:
    """Axes in the order of `Media`; diffusers puts channels last in arrays and first in tensors."""
    if kind == IMAGES and values.ndim == 5:
        kind = FRAMES
    axes = {IMAGES: 4, FRAMES: 5}.get(kind)
    if axes is not None:
        if values.ndim != axes:
            return None
        last, channels = values.shape[-1] in (1, 3, 4), values.shape[-3] in (1, 3, 4)
        if last and not (channels and values.shape[-1] > values.shape[-3]):
            values = values.movedim(-1, -3)
    if kind == AUDIO and values.ndim == 2:
        values = values[:, None]
    return Media(kind, values.contiguous())
