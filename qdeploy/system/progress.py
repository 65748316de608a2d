"""Progress and messages, on stderr only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Verbosity:
    """Verbosity: 0 errors only, 1 messages and progress bars, 2 details."""

    level: int = 1


verbosity = Verbosity()


def say(message: str, level: int = 1) -> None:
    """Print a line to stderr."""
    if verbosity.level >= level:
        print(message, file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar if stderr is a terminal or a notebook."""
    if verbosity.level < 1 or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=description)
