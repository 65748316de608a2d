"""Processes that a launcher such as torchrun started together."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes results."""
    return os.environ.get("RANK", "0") == "0"
