"""The results of `benchmarks.roundings` as a table."""

from __future__ import annotations

from typing import Any

from qdeploy.system.tables import Table

FIGURES = ("median", "pooled", "worst")


def table(records: list[dict[str, Any]]) -> Table:
    """The records side by side."""
    columns = ["model", "roundings", "CPU s", "W4A8: median / pooled / worst dB", "weights alone"]
    rows = [
        [
            record["model"],
            record["rounding"],
            f"{record['cpu_seconds']:.0f}",
            *(
                " / ".join(f"{record[kind][figure]:.1f}" for figure in FIGURES)
                for kind in ("W4A8", "weights alone")
            ),
        ]
        for record in records
    ]
    return Table(columns, rows)
