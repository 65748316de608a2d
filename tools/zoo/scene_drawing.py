"""Draws scenes: 64x64 pictures of flat shapes with smooth edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.evaluate.scene_world import BACKGROUNDS, COLOURS, SIZES, Scene

PIXELS = 64
# In radii: the room that a thing is given, and how far the tip of a star reaches, which may leave that room.
_REACH, _TIP = 1.15, 1.42
_GAP = 2.0
_TRIES = 128
_COLOUR_JITTER = 6.0

Picture = NDArray[np.float32]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Where a scene's things are.

    Attributes:
        centres: ``[things, 2]``, x to the right and y down, in pixels.
        radii: ``[things]`` in pixels.
    """

    centres: NDArray[np.float64]
    radii: NDArray[np.float64]


def random_layout(scene: Scene, generator: np.random.Generator) -> Layout:
    """Positions at which things have room inside the picture, and the relation is plain to see."""
    while True:
        radii = np.array([generator.uniform(*SIZES[thing.size]) for thing in scene.things])
        margins = (_REACH * radii + 1)[:, None]
        for _ in range(_TRIES):
            centres = generator.uniform(margins, PIXELS - margins, (len(radii), 2))
            if _apart(centres, radii) and _related(centres, scene.relation):
                return Layout(centres, radii)


def _apart(centres: NDArray[np.float64], radii: NDArray[np.float64]) -> bool:
    distances = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1))
    needed = _REACH * (radii[:, None] + radii[None]) + _GAP
    return bool((distances >= needed)[~np.eye(len(radii), dtype=bool)].all())


def _related(centres: NDArray[np.float64], relation: str | None) -> bool:
    if relation is None:
        return True
    along, across = centres[1] - centres[0] if relation == "left of" else (centres[1] - centres[0])[::-1]
    return bool(along > 0 and abs(across) <= 0.6 * along)


def draw(scene: Scene, layout: Layout, generator: np.random.Generator) -> Picture:
    """The picture ``[3, 64, 64]`` in [0, 1]; every colour is a little off, by the generator."""
    picture = np.empty((3, PIXELS, PIXELS), np.float32)
    picture[:] = _shade(BACKGROUNDS[scene.background], generator)[:, None, None]
    for thing, (x, y), radius in zip(scene.things, layout.centres, layout.radii, strict=True):
        reach = _TIP * radius + 1
        left, top = max(int(x - reach), 0), max(int(y - reach), 0)
        right, bottom = min(int(x + reach) + 1, PIXELS), min(int(y + reach) + 1, PIXELS)
        rows, columns = np.mgrid[top:bottom, left:right] + 0.5
        distance = _DISTANCES[thing.shape](columns - x, rows - y, radius)
        cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)
        colour = _shade(COLOURS[thing.colour], generator)[:, None, None]
        part = picture[:, top:bottom, left:right]
        part += cover * (colour - part)
    return picture


def _shade(colour: tuple[int, int, int], generator: np.random.Generator) -> Picture:
    off = generator.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, 3)
    shade: Picture = (np.clip(np.array(colour) + off, 0, 255) / 255).astype(np.float32)
    return shade


# Signed distances in pixels, negative inside; exact at the edges, which is all that smooth edges need.


def _circle(x: Array, y: Array, radius: float) -> Array:
    distance: Array = np.hypot(x, y) - radius
    return distance


def _square(x: Array, y: Array, radius: float) -> Array:
    distance: Array = np.maximum(abs(x), abs(y)) - 0.88 * radius
    return distance


def _triangle(x: Array, y: Array, radius: float) -> Array:
    return _ranked_plane(x, y + 0.1 * radius, 3, -1) - 0.6 * radius


def _star(x: Array, y: Array, radius: float) -> Array:
    # A pentagram is where at most one side of its inner pentagon is overstepped.
    return _ranked_plane(x, y, 5, -2) - 0.43 * radius


def _cross(x: Array, y: Array, radius: float) -> Array:
    long, short = radius, 0.34 * radius
    upright = np.maximum(abs(x) - short, abs(y) - long)
    lying = np.maximum(abs(x) - long, abs(y) - short)
    cross: Array = np.minimum(upright, lying)
    return cross


def _ranked_plane(x: Array, y: Array, sides: int, rank: int) -> Array:
    """Of the distances to a regular polygon's sides, seen from its centre, the one of that rank."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    distances = np.stack([x * np.cos(angle) + y * np.sin(angle) for angle in angles])
    ranked: Array = np.sort(distances, axis=0)[rank]
    return ranked


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross}
