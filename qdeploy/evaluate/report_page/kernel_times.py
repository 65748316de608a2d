"""Where an engine's time goes, by the runtime's own types of operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.engines.base import Kernel
from qdeploy.engines.measure import repeat_rows
from qdeploy.engines.registry import find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.store.artifact import EngineFolder
from qdeploy.store.probe import read_probe

_CALLS = 10


def kernel_times(engine: EngineFolder, probe: Path, batch: int, threads: int | None = None) -> dict[str, Any]:
    """Time of one call by type of operation.

    Args:
        engine: the engine.
        probe: folder of the artifact whose probe it is called with.
        batch: samples of a call.
        threads: of the engine; the runtime's own choice if None.

    Returns:
        ``batch``, and ``kinds`` by the runtime's type: ``kernels``, how many; ``ms``, in all; and ``int8_ms``, of
        those that compute in int8. ``kinds`` is empty where the runtime reports no times.
    """
    inputs = repeat_rows(read_probe(probe)[0], batch)
    with find_backend(engine.facts.backend).load(EngineSpec.of(engine), threads) as running:
        return {"batch": batch, "kinds": by_kind(running.kernels(inputs, calls=_CALLS))}


def by_kind(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Sums over kernels of a type, the longest first; kernels without a time are left out."""
    kinds: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        if kernel.ms is None:
            continue
        kind = kinds.setdefault(kernel.kind, {"kernels": 0, "ms": 0.0, "int8_ms": 0.0})
        kind["kernels"] += 1
        kind["ms"] += kernel.ms
        kind["int8_ms"] += kernel.ms if kernel.precision == "int8" else 0.0
    ordered = sorted(kinds.items(), key=lambda entry: -entry[1]["ms"])
    return {name: {key: round(value, 5) for key, value in kind.items()} for name, kind in ordered}
