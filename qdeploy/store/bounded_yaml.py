"""Reading YAML that somebody else may have written: bounded in size and depth, and without aliases.

A kilobyte of aliases of aliases stands for gigabytes. Recipes need none.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**20  # characters
DEEPEST = 32


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases and with a limit of depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*NAME): write the value out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str) -> Any:
    """A value of YAML.

    Raises:
        ValueError: it is none, too large or nested too deeply, uses aliases, or holds a number that is not finite.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} characters")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader without aliases)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    _check_finite(value)
    return value


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        ValueError: see `parse_yaml`, or it is no regular file of a sensible size.
        OSError: it cannot be read.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > 4 * LARGEST:
        raise ValueError("it is not a regular file, or too large")
    return parse_yaml(path.read_text(encoding="utf-8"))


def _check_finite(value: Any) -> None:
    if isinstance(value, dict):
        for item in (*value, *value.values()):
            _check_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_finite(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number that can be used")
