"""Calls that are timed by turns, so that all of them meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median


def cpu_ms(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median processor time of each call in milliseconds; in each round every call runs once."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for own, call in zip(took, calls, strict=True):
            began = time.process_time()
            call()
            own.append(time.process_time() - began)
    return [1e3 * median(own) for own in took]
