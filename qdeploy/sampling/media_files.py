"""Files of what was sampled.

images.safetensors      uint8 ``images`` [N, C, H, W];          00000.png ..., grid.png, images.npz if asked for
                        (or shards of the PNGs, see `qdeploy.sampling.shards`)
frames.safetensors      uint8 ``frames`` [N, F, C, H, W];       00000.gif ..., grid.png of the middle frames
audio.safetensors       float32 ``audio`` [N, channels, samples]; 00000.wav ..., 16 bits
embeddings.safetensors  float32 ``embeddings`` [N, ...]
"""

from __future__ import annotations

import io
import math
import wave
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.model.media import AUDIO, FRAMES, IMAGES, RATE, Media
from qdeploy.store.joined_tensors import shape_of
from qdeploy.system.errors import InvalidInputError

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


def write_items(
    folder: Path,
    media: Media,
    numbers: Sequence[int],
    seed: int,
    prompts: Sequence[str] | None,
    described: dict[str, Any],
) -> list[Path]:
    """Write each result as people open it.

    Args:
        folder: where.
        media: some results; pictures as uint8.
        numbers: of the results.
        seed: of result 0.
        prompts: used in turns, if there are any.
        described: what else a PNG's text chunks say.

    Returns:
        The files, one for each result; none for embeddings.

    Raises:
        InvalidInputError: images have a number of channels that PNG does not know.
    """
    files = []
    for number, value in zip(numbers, media.values, strict=True):
        file = folder / f"{number:05d}"
        if media.kind == IMAGES:
            chunks = PngInfo()
            for key, text in {"seed": seed + number, **described}.items():
                chunks.add_text(key, str(text))
            if prompts is not None:
                chunks.add_text("prompt", prompts[number % len(prompts)])
            file = file.with_suffix(".png")
            _picture(value).save(file, pnginfo=chunks)
        elif media.kind == FRAMES:
            frames = [_picture(frame) for frame in value]
            file = file.with_suffix(".gif")
            frames[0].save(file, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
        elif media.kind == AUDIO:
            file = file.with_suffix(".wav")
            file.write_bytes(wav(value))
        if file.suffix:
            files.append(file)
    return files


def write_grid(file: Path, kind: str, tensors: Sequence[Path]) -> None:
    """Write the first images, or the middle frames of the first videos, side by side.

    Args:
        file: the picture.
        kind: of the results; of other kinds there is no grid.
        tensors: files of `kind` as tensors, in order.
    """
    if kind not in (IMAGES, FRAMES):
        return
    shown: list[Tensor] = []
    for part in tensors:
        values = load_file(part)[kind]
        shown += values if kind == IMAGES else values[:, values.shape[1] // 2]
        if len(shown) >= GRID_LIMIT:
            break
    _picture(grid(torch.stack(shown[:GRID_LIMIT]))).save(file)


def write_npz(file: Path, tensors: Sequence[Path]) -> None:
    """Write images as one array ``arr_0`` [N, H, W, C] of bytes, as the evaluation suite of ADM reads them.

    The bytes are those of `numpy.savez`; one file of tensors at a time is in memory.

    Args:
        file: to write.
        tensors: files of ``images`` [n, C, H, W], in order.
    """
    shapes = [shape_of(part, IMAGES) for part in tensors]
    channels, height, width = shapes[0][1:]
    whole = (sum(shape[0] for shape in shapes), height, width, channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": whole}
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, header)
        for part in tensors:
            array.write(load_file(part)[IMAGES].permute(0, 2, 3, 1).contiguous().numpy().tobytes())


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
