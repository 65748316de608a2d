"""Sizes of a graph's inputs, as one string that a command line and a manifest can hold: ``--shapes``.

    sample:1x4x64x64,2x4x64x64,8x4x64x64;encoder_hidden_states:1x77x768,2x77x768,8x77x768

A tensor's three shapes are the least, the one that kernels are chosen for, and the largest; one shape stands
for all three, and an empty one is a scalar's: ``timestep:,,``. Several profiles are separated by ``|``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdeploy.system.errors import UsageError

Shape = tuple[int, ...]
EXAMPLE = "sample:1x4x64x64,2x4x64x64,8x4x64x64"


@dataclass(frozen=True)
class Range:
    """Shapes of one input: the least, the one to tune for, the largest."""

    least: Shape
    tuned: Shape
    largest: Shape

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape fits."""
        return len(shape) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.largest, strict=True)
        )

    def __str__(self) -> str:
        return ",".join("x".join(map(str, shape)) for shape in (self.least, self.tuned, self.largest))


Profile = Mapping[str, Range]


def describe(profiles: Sequence[Profile]) -> str:
    """Profiles as the string that `parse_shapes` reads."""
    return "|".join(";".join(f"{name}:{shapes}" for name, shapes in p.items()) for p in profiles)


def parse_shapes(text: str) -> list[dict[str, Range]]:
    """Read profiles from a string.

    Raises:
        UsageError: it cannot be read.
    """
    profiles = []
    for part in text.split("|"):
        profile: dict[str, Range] = {}
        for entry in filter(None, (entry.strip() for entry in part.split(";"))):
            # Names may hold colons; shapes do not.
            name, colon, shapes = entry.rpartition(":")
            try:
                found = [_shape(shape) for shape in shapes.split(",")]
            except ValueError:
                found = []
            if not colon or not name.strip() or len(found) not in (1, 3) or found == [()]:
                raise UsageError(
                    f"--shapes cannot be read at {entry!r}: write NAME:MIN,OPT,MAX as in {EXAMPLE}"
                )
            name = name.strip()
            if name in profile:
                raise UsageError(f"--shapes names {name!r} twice in one profile")
            profile[name] = Range(*(found * 3 if len(found) == 1 else found))
        if not profile:
            raise UsageError(f"--shapes has an empty profile: write NAME:MIN,OPT,MAX as in {EXAMPLE}")
        profiles.append(profile)
    return profiles


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x")) if text.strip() else ()


def hull(profiles: Sequence[Profile]) -> dict[str, Range]:
    """One profile that takes what any of several takes, tuned as the first that names an input.

    Args:
        profiles: at least one; shapes of one input have one number of axes.

    Raises:
        UsageError: an input has different numbers of axes.
    """
    found: dict[str, Range] = {}
    for profile in profiles:
        for name, shapes in profile.items():
            known = found.setdefault(name, shapes)
            if len(known.least) != len(shapes.least):
                raise UsageError(
                    f"--shapes gives {name!r} {len(known.least)} axes, and then {len(shapes.least)}"
                )
            least = tuple(map(min, known.least, shapes.least))
            found[name] = Range(least, known.tuned, tuple(map(max, known.largest, shapes.largest)))
    return found
