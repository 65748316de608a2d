"""How much memory there is, and how much this process has held, as the system tells it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def physical_memory() -> int | None:
    """The machine's memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no such call
        return None


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes; mapped files count where they were read.

    On Linux from its status, which begins with the program; what ``getrusage`` tells elsewhere may contain what the
    parent held before.

    Returns:
        None where the system tells neither.
    """
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
