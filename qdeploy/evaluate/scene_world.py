"""The closed world of the zoo's ``scenes``: what a picture can hold, and which combinations training never sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 45, 45),
    "green": (45, 165, 65),
    "blue": (50, 85, 220),
    "yellow": (245, 210, 45),
    "purple": (150, 60, 190),
    "cyan": (70, 205, 215),
}
SIZES = {"small": (6.5, 7.5), "large": (10.0, 11.5)}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (15, 15, 15),
    "brown": (105, 70, 45),
}
# With the two things exchanged, "right of" and "below" are these two.
RELATIONS = ("left of", "above")
MOST_THINGS = 3
# One combination in this many is held out.
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Thing:
    """A kind of object: its own attributes."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows; where exactly is left open.

    Attributes:
        things: one to three equal things, or two that differ in shape or colour.
        background: its colour.
        relation: position of the first of two different things relative to the second; None for equal things.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination of things, relation and background.

        The SHA-256 of its description decides, so the split needs no list and no seed.
        """
        digest = hashlib.sha256(repr((self.things, self.background, self.relation)).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def random_scene(generator: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene of the one or the other side of the split; half of them relate two different things."""
    while True:
        background = str(generator.choice(list(BACKGROUNDS)))
        first = _random_thing(generator)
        if generator.random() < 0.5:
            scene = Scene((first,) * int(generator.integers(1, MOST_THINGS + 1)), background)
        else:
            second = _random_thing(generator)
            if (first.shape, first.colour) == (second.shape, second.colour):
                continue
            scene = Scene((first, second), background, str(generator.choice(RELATIONS)))
        if scene.held_out == held_out:
            return scene


def _random_thing(generator: np.random.Generator) -> Thing:
    shape, colour, size = (str(generator.choice(list(values))) for values in (SHAPES, COLOURS, SIZES))
    return Thing(shape, colour, size)
