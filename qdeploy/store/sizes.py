"""The sizes of images that a graph takes, where it takes more than one.

`SizesFacts` hold ``listed``, pairs of height and width in latent pixels; or ``low`` and ``high``, two such pairs
between which every size is taken that ``multiple`` divides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec.structs import replace

from qdeploy.store.facts import SizesFacts
from qdeploy.system.errors import InvalidInputError, UsageError

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def read_sizes(text: str, factor: int, multiple: int) -> SizesFacts:
    """The sizes of a text like ``512x512,768x512`` or ``512x512..1024x1024``, height first, in pixels.

    Args:
        text: sizes of images.
        factor: pixels of an image for each pixel of a latent.
        multiple: what divides height and width of every latent that the network takes.

    Raises:
        UsageError: it is no such text, a range is empty, or a size is not divisible.
    """
    low, between, high = text.partition("..")
    sizes = [_read(part) for part in ([low, high] if between else text.split(","))]
    step = factor * multiple
    for height, width in sizes:
        if height % step or width % step or not height or not width:
            raise UsageError(
                f"--sizes: heights and widths are multiples of {step} here, not {height}x{width}"
            )
    latent = [[height // factor, width // factor] for height, width in sizes]
    if not between:
        unique = sorted(set(map(tuple, latent)))
        return SizesFacts(factor=factor, multiple=multiple, listed=[list(size) for size in unique])
    (low_height, low_width), (high_height, high_width) = latent
    if low_height > high_height or low_width > high_width:
        raise UsageError(f"--sizes: the range {text} ends before it begins")
    return SizesFacts(factor=factor, multiple=multiple, low=latent[0], high=latent[1])


def sizes_to_prove(sizes: SizesFacts) -> list[tuple[int, int]]:
    """Heights and widths in latent pixels at which parity is measured: all that are listed, or the range's ends."""
    pairs = sizes.listed or [pair for pair in (sizes.low, sizes.high) if pair]
    return [(height, width) for height, width in pairs]


def with_size(sizes: SizesFacts, height: int, width: int) -> SizesFacts:
    """The same with another size: it is listed, or the range is extended to it."""
    if sizes.low is None or sizes.high is None:
        listed = sorted({*map(tuple, sizes.listed or []), (height, width)})
        return replace(sizes, listed=[list(size) for size in listed])
    low, high = sizes.low, sizes.high
    return replace(
        sizes,
        low=[min(low[0], height), min(low[1], width)],
        high=[max(high[0], height), max(high[1], width)],
    )


def size_probe(height: int, width: int) -> str:
    """Name of the file that holds the probe of a size."""
    return f"sizes/{height}x{width}.safetensors"


def check_size(sizes: SizesFacts | None, shape: Sequence[int], where: str) -> None:
    """Refuse a size that a graph was not exported for.

    Args:
        sizes: the artifact's; None where the graph has one size, and so checks it itself.
        shape: of the noisy sample, ``[batch, channels, height, width]``.
        where: the artifact, for the message.

    Raises:
        InvalidInputError: the size is not listed, or outside of the range, or not divisible.
    """
    if sizes is None:
        return
    factor, (height, width) = sizes.factor, (int(size) for size in shape[-2:])
    if sizes.low is None or sizes.high is None:
        fits = [height, width] in (sizes.listed or [])
        known = ", ".join(f"{h * factor}x{w * factor}" for h, w in sizes.listed or [])
    else:
        (low_height, low_width), (high_height, high_width) = sizes.low, sizes.high
        between = low_height <= height <= high_height and low_width <= width <= high_width
        fits = between and height % sizes.multiple == 0 and width % sizes.multiple == 0
        known = (
            f"{low_height * factor}x{low_width * factor} to {high_height * factor}x{high_width * factor}, in "
            f"steps of {factor * sizes.multiple}"
        )
    if not fits:
        raise InvalidInputError(
            f"{where} was exported for images of {known} (height x width), not {height * factor}x{width * factor}"
        )


def _read(part: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(part.strip())
    if found is None:
        raise UsageError(
            f"--sizes takes HEIGHTxWIDTH,... or HEIGHTxWIDTH..HEIGHTxWIDTH, such as 512x512,768x512, not {part!r}"
        )
    return int(found[1]), int(found[2])
