"""Estimates of what a piece of work costs, reported before it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """An estimate of cost.

    Attributes:
        seconds: wall-clock time on this machine.
        bytes: memory, or disk space, that is taken.
    """

    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{readable_time(self.seconds)}, {readable_size(self.bytes)}"


def readable_time(seconds: float) -> str:
    """A duration in the unit that people would use."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def readable_size(size: float) -> str:
    """A number of bytes in kB, MB or GB."""
    if size < 2**20:
        return f"{size / 2**10:.0f} kB"
    return f"{size / 2**20:.1f} MB" if size < 2**30 else f"{size / 2**30:.1f} GB"
