"""Parsers of lint's options."""

from __future__ import annotations

import re

from qdeploy.export.graph.shapes import Shape
from qdeploy.system.errors import UsageError


def parse_version(text: str, option: str) -> tuple[int, int]:
    """Major and minor of ``11.4`` or ``11``.

    Raises:
        UsageError: the text is no version.
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.[\d.]+)?", text)
    if match is None:
        raise UsageError(f"{option} {text!r} is no version: write major.minor, such as 11.4")
    return int(match[1]), int(match[2] or 0)


def parse_shapes(text: str) -> dict[str, tuple[Shape, Shape, Shape]]:
    """A profile from ``name:min,opt,max;...``, each shape as ``1x4x64x64``; an empty shape is a scalar's.

    Raises:
        UsageError: the text is no profile.
    """
    profile = {}
    for entry in filter(None, text.split(";")):
        name, colon, sizes = entry.rpartition(":")
        shapes = sizes.split(",")
        if not colon or not name.strip() or len(shapes) != 3:
            raise UsageError(
                f"--shapes {entry!r}: write name:min,opt,max, such as sample:1x4x64x64,2x4x64x64,8x4x64x64"
            )
        try:
            smallest, optimal, largest = (tuple(int(n) for n in s.split("x") if n.strip()) for s in shapes)
        except ValueError:
            raise UsageError(
                f"--shapes {entry!r}: shapes are numbers with x between, such as 1x4x64x64"
            ) from None
        profile[name.strip()] = (smallest, optimal, largest)
    return profile
