"""Suggestions for misspelled names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The known name that is nearest, to follow the given one in a sentence; empty if none is near."""
    found = get_close_matches(str(given), list(known), n=1, cutoff=0.7)  # a damaged file may hold anything
    return f" (did you mean {found[0]!r}?)" if found else ""


def unknown(what: str, given: str, known: Iterable[str], more: str = "") -> str:
    """The sentence that refuses an unknown name.

    Args:
        what: what it would be the name of.
        given: the name.
        known: the names that there are.
        more: what else can be given, such as ``, or a YAML file``.
    """
    listed = list(known)
    return f"unknown {what} {given!r}{did_you_mean(given, listed)}: choose from {', '.join(listed)}{more}"
