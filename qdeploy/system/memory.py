"""The machine's memory, and the peak memory of this process."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def physical_memory() -> int | None:
    """The machine's memory in bytes; None where it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no such call
        return None


def peak_memory() -> int | None:
    """The peak resident memory of this process in bytes; mapped files count where they were read.

    On Linux from ``/proc``, which starts counting with the program; elsewhere from ``getrusage``, whose value may
    include the parent's memory at the fork.

    Returns:
        None where neither is available.
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


def give_back_freed() -> None:
    """Let the allocator return freed memory to the system, where it is glibc's: it keeps it in pieces of its heap."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
