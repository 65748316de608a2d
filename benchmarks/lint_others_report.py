"""The table of what `benchmarks/lint_others.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.system.tables import MISSING, Table

COLUMNS = (
    *("quantizer", "rejected (E)", "slow or inaccurate (W)", "int8 MACs", "own kernels", "after `--fix`"),
    *("low-bit in the plan", "products in the plan", "kernels"),
)


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each quantizer: rules and how often each fires, and NVIDIA's plan of the graph as it stands."""
    return Table(COLUMNS, [_row(row) for row in results])


def _row(row: Mapping[str, Any]) -> list[str]:
    waived = f"; waived: {_counts(row['waived'])}" if row["waived"] else ""
    fixed = row.get("after_fix")
    return [
        row["quantizer"]
        if row["quantizer"].startswith("qdeploy")
        else f"{row['quantizer']} ({row['version']})",
        _counts(row["errors"]) or "none",
        (_counts(row["warnings"]) or "none") + waived,
        f"{row['int8_macs']:.0%}",
        str(row["own_kernels"]),
        f"{fixed['E']} E, {fixed['W']} W" if fixed else "as it is",
        *_plan(row.get("plan")),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} x{count}" for rule, count in counts.items())


def _plan(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return [MISSING] * 3
    if not plan["built"]:
        return [f"refused: {' '.join(plan['reason'].split())[:140]}", MISSING, MISSING]
    products = ", ".join(f"{kind} {count}" for kind, count in plan["products"].items())
    share = plan["as_planned"] / plan["layers"]
    low = f"{plan['as_planned']} of {plan['planned']}, {share:.0%} of all {plan['layers']}"
    return [low, products, str(plan["kernels"])]
