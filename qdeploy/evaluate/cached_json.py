"""A cache of measurements in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdeploy.store.files import write_json
from qdeploy.system.hashing import sha256_of
from qdeploy.version import __version__


def cached_result(file: Path, key: object, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The cached result of an earlier run; else the result of ``measure``, which is then cached.

    Args:
        file: where the result is kept.
        key: JSON value of everything that the result depends on; another key is another measurement.
        measure: returns a JSON object.
    """
    wanted = sha256_of([__version__, key])
    try:
        stored = json.loads(file.read_text())
        if stored["key"] == wanted:
            return dict(stored["value"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: it is measured again
    value = measure()
    write_json(file, {"key": wanted, "value": value})
    return value
