"""Captions of scenes, and what a caption asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qdeploy.evaluate.scene_world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing

COUNTS = ("a", "two", "three")
_INVERSE = {"left of": "right of", "above": "below"}
# Each of size and background is left out in this share of the captions.
_UNSAID = 0.15

_NOUN = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PATTERN = re.compile(
    rf"(?:(a|two|three) )?{_NOUN}(?:e?s)?"
    rf"(?: ({'|'.join([*RELATIONS, *_INVERSE.values()])}) a {_NOUN})?"
    rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
)


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for; None where it leaves something open.

    Attributes:
        things: shape, colour and size of each thing.
        background: colour of the background.
        relation: position of the first thing relative to the second: "left of" or "above".
    """

    things: tuple[tuple[str, str, str | None], ...]
    background: str | None
    relation: str | None


def caption(scene: Scene, generator: np.random.Generator | None = None, *, turned: bool | None = None) -> str:
    """A caption of a scene: the full one, or with a generator, one of its many.

    Args:
        scene: what to describe.
        generator: sometimes leaves out size or background, and begins with either thing.
        turned: begin with the second thing ("right of", "below"); by the generator if None.
    """
    chance = generator.random(3) if generator else np.ones(3)
    sized, grounded = chance[:2] >= _UNSAID
    first = scene.things[0]
    if scene.relation is None:
        count = len(scene.things)
        text = f"{COUNTS[count - 1]} {_noun(first, sized, plural=count > 1)}"
    else:
        second, relation = scene.things[1], scene.relation
        if turned if turned is not None else chance[2] < 0.5:
            first, second, relation = second, first, _INVERSE[relation]
        text = f"a {_noun(first, sized)} {relation} a {_noun(second, sized)}"
    return text + (f" on a {scene.background} background" if grounded else "")


def _noun(thing: Thing, sized: bool, plural: bool = False) -> str:
    ending = ("es" if thing.shape.endswith("ss") else "s") if plural else ""
    return f"{thing.size + ' ' if sized else ''}{thing.colour} {thing.shape}{ending}"


def wanted(text: str) -> Wanted | None:
    """What a caption in the world's language asks for; None for any other text."""
    match = _PATTERN.fullmatch(" ".join(text.lower().strip(" .").split()))
    if match is None:
        return None
    count, size, colour, shape, relation, size_2, colour_2, shape_2, background = match.groups()
    first = (shape, colour, size)
    if relation is None:
        return Wanted((first,) * (COUNTS.index(count or "a") + 1), background, None)
    if count not in (None, "a"):
        return None
    second = (shape_2, colour_2, size_2)
    if relation in _INVERSE.values():
        (relation,) = (plain for plain, inverse in _INVERSE.items() if inverse == relation)
        first, second = second, first
    return Wanted((first, second), background, relation)
