"""Telemetry of the libraries below is off: qdeploy and what it runs send nothing about their user.

ONNX Runtime (1.31) sends events to its maker from its official builds unless a variable says otherwise before it is
imported, and writes an identifier of the session to the temporary folder; huggingface_hub and Ray have a switch each.
Whoever sets one of these variables keeps it.
"""

from __future__ import annotations

import os

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def turn_off() -> None:
    """Set the switches of this process and its children that are not set yet."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
