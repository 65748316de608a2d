"""Files of what was sampled.

images.safetensors      uint8 ``images`` [N, C, H, W];          00000.png ..., grid.png, images.npz if asked for
frames.safetensors      uint8 ``frames`` [N, F, C, H, W];       00000.gif ..., grid.png of the middle frames
audio.safetensors       float32 ``audio`` [N, channels, samples]; 00000.wav ..., 16 bits
embeddings.safetensors  float32 ``embeddings`` [N, ...]
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qdeploy.model.media import AUDIO, FRAMES, IMAGES, RATE, Media
from qdeploy.store.builder import Draft
from qdeploy.system.errors import InvalidInputError, UsageError

GRID = "grid.png"
NPZ = "images.npz"
GRID_LIMIT = 64
FRAME_MS = 125  # how long a GIF shows a frame
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def file_of(kind: str) -> str:
    """The file that holds all results of a kind as tensors."""
    return f"{kind}.safetensors"


def as_stored(media: Media) -> Tensor:
    """Pictures as uint8, everything else as it is."""
    if media.kind not in (IMAGES, FRAMES):
        return media.values
    return (media.values * 255).round().clamp(0, 255).to(torch.uint8)


def write_media(
    draft: Draft[Any], media: Media, seed: int, prompts: Sequence[str] | None, described: dict[str, Any]
) -> None:
    """Write each result as people open it.

    Args:
        draft: of the samples.
        media: all of them; pictures as uint8.
        seed: of the first.
        prompts: used in turns, if there are any.
        described: what else a PNG's text chunks say.

    Raises:
        InvalidInputError: images have a number of channels that PNG does not know.
    """
    if media.kind == IMAGES:
        _write_images(draft, media.values, seed, prompts, described)
    elif media.kind == FRAMES:
        for number, video in enumerate(media.values):
            frames = [_picture(frame) for frame in video]
            file = draft.content / f"{number:05d}.gif"
            frames[0].save(file, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
        middle = media.values[:GRID_LIMIT, media.values.shape[1] // 2]
        _picture(grid(middle)).save(draft.content / GRID)
    elif media.kind == AUDIO:
        for number, sound in enumerate(media.values):
            (draft.content / f"{number:05d}.wav").write_bytes(wav(sound))


def write_npz(draft: Draft[Any], media: Media) -> None:
    """Write images as one array ``arr_0`` [N, H, W, C] of bytes, as the evaluation suite of ADM reads them.

    Raises:
        UsageError: the results are no images.
    """
    if media.kind != IMAGES:
        raise UsageError(f"an .npz file is of images, and these are {media.kind}")
    np.savez(draft.content / NPZ, media.values.permute(0, 2, 3, 1).numpy())


def wav(sound: Tensor, rate: int = RATE) -> bytes:
    """A sound ``[channels, samples]`` in [-1, 1] as a WAV file of 16 bits."""
    codes = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(codes.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def _write_images(
    draft: Draft[Any], images: Tensor, seed: int, prompts: Sequence[str] | None, described: dict[str, Any]
) -> None:
    for number, image in enumerate(images):
        chunks = PngInfo()
        for key, value in {"seed": seed + number, **described}.items():
            chunks.add_text(key, str(value))
        if prompts is not None:
            chunks.add_text("prompt", prompts[number % len(prompts)])
        _picture(image).save(draft.content / f"{number:05d}.png", pnginfo=chunks)
    _picture(grid(images[:GRID_LIMIT])).save(draft.content / GRID)


def grid(images: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` side by side, as square as possible: ``[C, rows * H, columns * W]``."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = images.new_zeros(rows * columns, channels, height, width)
    padded[:count] = images
    grid = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def _picture(image: Tensor) -> Image.Image:
    channels = image.shape[0]
    if channels not in _MODES:
        raise InvalidInputError(f"images of {channels} channels cannot be written as PNG")
    pixels = image.permute(1, 2, 0).squeeze(2) if channels == 1 else image.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy(), mode=_MODES[channels])
