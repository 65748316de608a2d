"""When to stop learning: once rows that nothing is learned from gain no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

State = TypeVar("State")

PATIENCE = 2  # windows without enough gain


class EarlyStop(Generic[State]):
    """Judges what has been learned every so many steps, keeps the best of it, and says when to stop.

    Args:
        judge: the held-out error of what has been learned so far, and that itself.
        share: a window has gained enough if the error is lower than the least before it by this share.
        window: steps between judgements.
        start: the first steps, such as a warm-up, in which it does not stop.

    Attributes:
        steps: that were taken.
        error: the least that was judged.
        best: what had it; None before the first judgement.
    """

    def __init__(
        self, judge: Callable[[], tuple[float, State]], share: float, window: int, start: int = 0
    ) -> None:
        self.judge, self.share, self.window, self.start = judge, share, window, start
        self.steps = self.idle = 0
        self.error = float("inf")
        self.best: State | None = None

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step, counted from 0: `PATIENCE` windows in a row have gained too little."""
        self.steps = step + 1
        if self.steps % self.window:
            return False
        error, state = self.judge()
        self.idle = 0 if error < self.error * (1 - self.share) else self.idle + 1
        if error < self.error:
            self.error, self.best = error, state
        return self.idle >= PATIENCE and self.steps > self.start
