"""The table of what `benchmarks/block_products.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.system.tables import Table

COLUMNS = ("weights", "precision", "group of activations", "CPU ms", "beside bf16", "SQNR dB")


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each way to compute the chain; a group of 0 leaves activations in float."""
    bf16 = next(r["cpu_ms"] for r in results if (r["weights"], r["precision"]) == ("float", "bf16"))
    return Table(
        COLUMNS,
        [
            [
                row["weights"],
                row["precision"],
                str(row["group"] or "none"),
                f"{row['cpu_ms']:.1f}",
                f"{bf16 / row['cpu_ms']:.2f}x",
                f"{row['sqnr_db']:.1f}",
            ]
            for row in results
        ],
    )
