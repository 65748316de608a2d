"""Pictures side by side, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qdeploy.store.files import write_atomically
from qdeploy.system.errors import InvalidInputError

_PAPER, _INK = 255, 0
_HEAD, _BETWEEN = 32, 4  # pixels for the titles, and between images
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_grid(
    groups: Mapping[str, Tensor], output: Path, *, columns: int = 4, scale: int | None = None, gap: int = 16
) -> None:
    """Write groups of images side by side, each under its title, the same seed at the same place.

    Args:
        groups: uint8 images ``[N, C, H, W]`` by title.
        output: the PNG file.
        columns: images in a row of each group.
        scale: pixels per pixel; by default enough to make an image about 64 pixels wide.
        gap: pixels between groups.

    Raises:
        InvalidInputError: groups differ in size, or have channels that a PNG cannot hold.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {tuple(images.shape) for images in groups.values()}
    if len(shapes) != 1:
        raise InvalidInputError(f"images of different sizes cannot be compared: {sorted(shapes)}")
    count, channels, height, width = shapes.pop()
    if channels not in _MODES:
        raise InvalidInputError(f"images of {channels} channels cannot be written as PNG")
    factor = scale or max(1, round(64 / width))
    tile = (width * factor, height * factor)
    font = ImageFont.load_default(size=20)
    block = columns * (tile[0] + _BETWEEN)
    # A title that is wider than its images makes room for itself.
    step = max(block, *(math.ceil(font.getlength(title)) for title in groups)) + gap
    bottom = _HEAD + math.ceil(count / columns) * (tile[1] + _BETWEEN) + gap
    mode = _MODES[channels]
    sheet = Image.new(mode, (step * len(groups) + gap, bottom), _color(_PAPER, channels))
    draw = ImageDraw.Draw(sheet)
    for index, (title, images) in enumerate(groups.items()):
        left = gap + index * step
        draw.text((left, _HEAD // 2), title, fill=_color(_INK, channels), font=font, anchor="lm")
        for place, image in enumerate(images):
            row, column = divmod(place, columns)
            corner = (left + column * (tile[0] + _BETWEEN), _HEAD + row * (tile[1] + _BETWEEN))
            sheet.paste(_picture(image, mode).resize(tile, Image.Resampling.NEAREST), corner)
    write_atomically(output, lambda partial: sheet.save(partial, format="PNG"))


def _color(level: int, channels: int) -> Any:
    return level if channels == 1 else (level,) * 3 + (255,) * (channels - 3)


def _picture(image: Tensor, mode: str) -> Any:
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)
