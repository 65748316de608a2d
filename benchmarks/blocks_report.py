"""The results of `benchmarks.blocks` as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdeploy.system.tables import Table

COLUMNS = (
    "engine", "MB on disk", "MB of memory", "s to load", "CPU ms a call", "beside bf16", "SQNR dB", "parity dB"
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A row for each engine; speed beside OpenVINO's bf16 engine of the same model's float graph."""
    bf16 = {
        row["shape"]: row["cpu_ms"]
        for row in results
        if (row["weights"], row["precision"]) == ("float", "bf16")
    }
    rows = [
        [
            f"{row['shape']}, {row['weights']}, {row['backend']} {row['precision']}",
            f"{row['disk_mb']:.1f}",
            f"{row['memory_mb']:.0f}",
            f"{row['load_seconds']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{bf16[row['shape']] / row['cpu_ms']:.2f}x",
            f"{row['sqnr_db']:.1f}",
            f"{row['parity_db']:.1f}",
        ]
        for row in results
    ]
    return Table(list(COLUMNS), rows)
