"""Formats of single layers that differ from the rest of a recipe.

A recipe's ``layers`` is a list of shell globs of layer paths, each with the formats of the layers that it
matches; later entries override earlier ones:

    layers:
      - "down_blocks.0.*": {weights: int8}
      - "mid_block.*.to_q": {weights: int6, activations: none}
      - "up_blocks.2.*": {weights: none}       # stays in float
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qdeploy.recipe.formats import NONE, Format
from qdeploy.system.errors import InvalidInputError, UsageError

PARTS = ("weights", "activations")
Overrides = tuple[tuple[str, Mapping[str, str]], ...]


def parse_overrides(given: Any) -> Overrides:
    """The entries of a recipe's ``layers``, from a list of mappings or one mapping.

    Raises:
        InvalidInputError: it is neither, or an entry holds something else than formats.
    """
    if isinstance(given, Mapping):
        entries = list(given.items())
    elif isinstance(given, list | tuple):
        entries = [_pair(entry) for entry in given]
    else:
        raise InvalidInputError(f"the recipe's layers must be a list of patterns with formats, not {given!r}")
    return tuple((str(pattern), _formats(pattern, formats)) for pattern, formats in entries)


def _pair(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, tuple) and len(entry) == 2:
        return entry
    if isinstance(entry, Mapping) and len(entry) == 1:
        return next(iter(entry.items()))
    raise InvalidInputError(f"an entry of the recipe's layers is a pattern with formats, not {entry!r}")


def _formats(pattern: Any, formats: Any) -> Mapping[str, str]:
    words = isinstance(formats, Mapping) and all(isinstance(word, str) for word in formats.values())
    if not words or not formats or set(formats) - set(PARTS):
        raise InvalidInputError(
            f"the recipe's layers give {pattern!r} weights, activations or both, such as {{weights: int8}}, not "
            f"{formats!r}"
        )
    return dict(formats)


def formats_of(path: str, weights: str, activations: str, overrides: Overrides) -> tuple[str, str]:
    """The formats of a layer's weight and input; a layer without integer weights is in float altogether."""
    chosen = {"weights": weights, "activations": activations}
    for pattern, formats in overrides:
        if fnmatchcase(path, pattern):
            chosen |= formats
    return (chosen["weights"], chosen["activations"]) if chosen["weights"] != NONE else (NONE, NONE)


def combinations(weights: str, activations: str, overrides: Overrides) -> list[tuple[str, str]]:
    """Every pair of formats that a layer may end up with, the recipe's own first.

    What layers really have depends on which globs meet; each override is taken alone.
    """
    found = {(weights, activations): None}
    for _, formats in overrides:
        pair = formats.get("weights", weights), formats.get("activations", activations)
        found[pair if pair[0] != NONE else (NONE, NONE)] = None
    return list(found)


def check_overrides(overrides: Overrides, paths: Iterable[str], coverage: str) -> None:
    """Make sure that every pattern means some layer.

    Raises:
        UsageError: one matches none of the paths.
    """
    known = list(paths)
    for pattern, _ in overrides:
        if not any(fnmatchcase(path, pattern) for path in known):
            raise UsageError(
                f"the recipe gives formats to {pattern!r}, which is no layer that coverage {coverage} quantizes"
            )


def span(formats: Iterable[Format | None]) -> str:
    """One format in short, or the least and the most of several; ``fp`` for float, which alone if all are."""
    distinct = list(dict.fromkeys(formats))
    if len(distinct) > 1:
        distinct = [number_format for number_format in distinct if number_format] or distinct
    ordered = sorted(distinct, key=lambda each: each.bits if each else 0)
    names = [each.short if each else "fp" for each in ordered]
    return names[0] if names[0] == names[-1] else f"{names[0]}-{names[-1]}"
