"""Reading JSON that somebody else may have written: bounded in size and depth, with finite numbers only."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

from qdeploy.system.errors import InvalidInputError

LARGEST_BYTES = 64 * 2**20  # a sensitivity report of a network of 10,000 layers has a tenth of it
DEEPEST = 64
LARGEST_INTEGER = 2**63 - 1


def read_json_object(path: Path, largest: int = LARGEST_BYTES, *, infinities: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        largest: bytes that it may have.
        infinities: take the words ``Infinity`` and ``-Infinity``, which diffusers writes into configurations of
            schedulers.

    Raises:
        InvalidInputError: it is no regular file, too large, no JSON object in UTF-8, nested too deeply, or holds
            a number that is not finite or has more than 64 bits.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise InvalidInputError(f"{path} cannot be read: it is not a regular file")
        if state.st_size > largest:
            raise InvalidInputError(f"{path} cannot be read: it has more than {largest >> 20} MiB")
        value = parse_json(path.read_bytes(), infinities=infinities)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{path} cannot be read: it holds no JSON object")
    return value


def parse_json(content: bytes, *, infinities: bool = False) -> Any:
    """A JSON value, its depth and its numbers checked.

    Raises:
        ValueError: it is none, or out of bounds.
    """
    try:
        value = json.loads(
            content.decode(), parse_constant=_infinite if infinities else _refuse, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_bounds(value)
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _infinite(word: str) -> float:
    return _refuse(word) if word == "NaN" else float(word)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _check_bounds(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, int) and not -LARGEST_INTEGER <= item <= LARGEST_INTEGER:
                raise ValueError("it holds an integer of more than 64 bits")
        level, depth = inner, depth + 1
