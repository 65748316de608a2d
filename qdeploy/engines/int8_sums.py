"""How wide the sums of int8 products have to be in an engine."""

from __future__ import annotations

from pathlib import Path

from qdeploy.export.graph import read
from qdeploy.export.passes.narrow_sums import overflowing
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import NARROW, WIDE, int8_sums_saturate
from qdeploy.system.progress import say


def sums_of(graph: Path) -> int:
    """Bits that the sums of int8 products need in the engine of a graph; reports the layers that stay in float."""
    try:
        layers = [layer.name for _, layer in overflowing(read(graph))]
    except InvalidInputError:  # the backend's own message will state what is wrong
        return NARROW
    if not layers:
        return NARROW
    if not int8_sums_saturate():
        return WIDE
    say(
        f"warning: {len(layers)} layers with 8-bit weights are computed in floats: without VNNI, this processor adds "
        "int8 products in 16 bits, which they could overflow; weights of 7 bits run in int8 here: calibrate with "
        "--weights int7"
    )
    return NARROW
