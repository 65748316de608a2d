"""The table of a sweep whose records were kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.workflows.sweep import SweepResult


def tables(content: Mapping[str, Any]) -> str:
    """What the sweep printed."""
    return SweepResult(Path(), content["request"], content["records"]).as_table().markdown()
