"""Where things go when nobody says where."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``QDEPLOY_CACHE``, else ``qdeploy`` in the user's cache folder."""
    if given := os.environ.get("QDEPLOY_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdeploy"


def default_output(source: Path, suffix: str) -> Path:
    """``NAME-SUFFIX`` in the working directory, where NAME is the source's."""
    return Path(f"{source.resolve().name}-{suffix}")
