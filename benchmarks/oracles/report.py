"""The results of `benchmarks.oracles.run` as a table."""

from __future__ import annotations

from typing import Any

from qdeploy.system.tables import Table

FIGURES = ("median", "pooled", "worst")


def table(records: list[dict[str, Any]]) -> Table:
    """Ours and theirs side by side, by calibration."""
    columns = ["method", "bits", "coverage", "seed", "whose", "median / pooled / worst dB", "CPU s"]
    rows = [
        [
            record["method"], record["bits"], record["coverage"], str(record["seed"]),
            "ours" if record["who"] == "ours" else "the authors'",
            " / ".join(f"{record[record['bits']][figure]:.1f}" for figure in FIGURES),
            f"{record['cpu_seconds']}",
        ]
        for record in sorted(records, key=lambda each: (each["method"], each["bits"], each["coverage"], each["seed"]))
    ]  # fmt: skip
    return Table(columns, rows)
