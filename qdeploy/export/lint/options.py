"""Parsers of lint's options."""

from __future__ import annotations

import re

from qdeploy.export.graph.shapes import Shape
from qdeploy.export.input_shapes import hull, parse_shapes
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


def profile_of(text: str) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The smallest, optimal and largest shapes of inputs, over all profiles of ``--shapes``.

    Raises:
        UsageError: the text is no profile.
    """
    profile = hull(parse_shapes(text))
    return {name: (shapes.least, shapes.tuned, shapes.largest) for name, shapes in profile.items()}
