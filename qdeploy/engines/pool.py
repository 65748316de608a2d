"""A pool of what only one thread at a time may use, such as a runtime's inference requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Hands every thread a member of its own, and makes a new one only where all are in use.

    It therefore holds as many members as there were ever threads at the same time. The member that came back
    last is used first, so that a single thread always works with the same one.

    Args:
        make: makes a member.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, Lock()
        self._idle: list[T] = []
        self.made = 0

    @contextmanager
    def take(self) -> Iterator[T]:
        """A member for the calling thread alone, as long as the context lasts."""
        with self._lock:
            member = self._idle.pop() if self._idle else None
            if member is None:
                self.made += 1
        if member is None:
            member = self._make()
        try:
            yield member
        finally:
            with self._lock:
                self._idle.append(member)
