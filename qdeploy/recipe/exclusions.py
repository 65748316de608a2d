"""Patterns of layers that stay in float: each has to match something, and all of them not everything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qdeploy.system.errors import UsageError


def check_exclude(patterns: Sequence[str], layers: Iterable[str], covered: Iterable[str]) -> None:
    """Refuse patterns that do not do what they are there for.

    Args:
        patterns: shell globs.
        layers: paths of all layers of the network.
        covered: paths of those that would be quantized without the patterns.

    Raises:
        UsageError: a pattern matches no layer, with what was probably meant; or nothing is left to quantize.
    """
    paths, wanted = list(layers), list(covered)
    for pattern in patterns:
        if not _matched(pattern, paths):
            raise UsageError(f"--exclude {pattern!r} matches no layer of the network{_meant(pattern, paths)}")
    left = [path for path in wanted if not any(fnmatchcase(path, pattern) for pattern in patterns)]
    if wanted and not left:
        named = " ".join(f"--exclude {pattern!r}" for pattern in patterns)
        raise UsageError(f"nothing would be quantized: {named} matches all {len(wanted)} layers")


def _matched(pattern: str, paths: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for path in paths)


def _meant(pattern: str, paths: Sequence[str]) -> str:
    """The end of the sentence: what the pattern was probably meant to be."""
    parts = [part.strip() for part in pattern.split(",")]
    if len(parts) > 1:
        each = " ".join(f"--exclude {part!r}" for part in parts if part)
        return f": one pattern at a time, {each}"
    glob = re.sub(r"\.\*", "*", pattern.strip("^$").replace(r"\.", "\0")).replace("\0", ".")
    if (re.search(r"[\\^$]", pattern) or pattern.startswith(".*")) and _matched(glob, paths):
        return f": patterns are shell globs, not regular expressions, so write {glob!r}"
    for inner in (f"{pattern.rstrip('.')}.*", f"*{pattern}", f"*.{pattern}.*"):
        if _matched(inner, paths):
            return f": did you mean {inner!r}?"
    known = {
        ".".join(path.split(".")[: depth + 1]): path for path in paths for depth in range(path.count(".") + 1)
    }
    bare = pattern.rstrip("*").rstrip(".")
    if close := get_close_matches(bare, known, 1, 0.6):
        inner = close[0] if close[0] in paths else f"{close[0]}.*"
        return f": did you mean {inner!r}?"
    return f": layers have names such as {paths[0]!r}" if paths else ""
