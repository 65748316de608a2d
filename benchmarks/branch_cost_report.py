"""The table of what `benchmarks/branch_cost.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.system.tables import Table

COLUMNS = ("layer", "runtime", "kind", "CPU ms a call", "beside plain", "in float, dB", "parity dB")


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each kind of layer; times beside those of the plain layer on the same runtime."""
    rows = []
    for row in results:
        plain = next(
            each["cpu_ms"]
            for each in results
            if (each["outputs"], each["backend"], each["kind"]) == (row["outputs"], row["backend"], "plain")
        )
        rows.append(
            [
                f"1152 by {row['outputs']}",
                row["backend"],
                row["kind"],
                f"{row['cpu_ms']:.2f}",
                f"{row['cpu_ms'] / plain:.2f}",
                f"{row['float_db']:.0f}",
                f"{row['parity_db']:.0f}",
            ]
        )
    return Table(COLUMNS, rows)
