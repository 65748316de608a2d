"""Telemetry of the libraries below is off: qdeploy and what it runs send nothing about their user.

ONNX Runtime (1.31) sends events to its maker from its official builds unless a variable says otherwise before it is
imported, and writes an identifier of the session to the temporary folder; huggingface_hub and Ray have a switch each.
Who sets one of these variables keeps it. OpenVINO (2026.4) sends an event when its Python package is imported, and
writes an identifier to the home folder, except in continuous integration.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_CONTINUOUS_INTEGRATION = "TF_BUILD"  # one of the variables that OpenVINO knows it by


def turn_off() -> None:
    """Set the switches of this process and its children that are not set yet."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


def import_silently(name: str) -> Any:
    """A module, imported as in continuous integration, where OpenVINO sends nothing."""
    if name in sys.modules:
        return sys.modules[name]
    before = os.environ.get(_CONTINUOUS_INTEGRATION)
    os.environ[_CONTINUOUS_INTEGRATION] = before or "1"
    try:
        return import_module(name)
    finally:
        if before is None:
            del os.environ[_CONTINUOUS_INTEGRATION]
