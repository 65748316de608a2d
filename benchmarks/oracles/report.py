"""The results of `benchmarks.oracles.run` as a table."""

from __future__ import annotations

from statistics import mean
from typing import Any

from qdeploy.system.tables import Table

FIGURES = ("median", "pooled", "worst")
WHOSE = {"ours": "qdeploy", "theirs": "the authors'"}


def table(records: list[dict[str, Any]]) -> Table:
    """Ours and theirs side by side: means over calibrations, and their range."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        steps = " + ".join(str(count) for count in record["steps"])
        who = WHOSE[record["who"]] + (
            f", `{record['recipe']}`" if record.get("recipe", record["method"]) != record["method"] else ""
        )
        model = record.get("model", "digits")
        key = (record["method"], model, record["bits"].upper(), record["coverage"], steps, who)
        groups.setdefault(key, []).append(record)
    head = [
        "method", "model", "bits", "layers", "steps a unit", "whose code", "calibrations", "median dB", "pooled dB",
        "worst dB", "CPU s", "imported, dB",
    ]  # fmt: skip
    rows = []
    for key, own in sorted(groups.items()):
        found = [record[record["bits"]] for record in own]
        imported = [record["imported"]["worst"] for record in own if "imported" in record]
        rows.append(
            [
                *key,
                str(len(own)),
                *(_spread([each[figure] for each in found]) for figure in FIGURES),
                f"{mean(record['cpu_seconds'] for record in own):.0f}",
                f"{min(imported):.0f}"
                if imported
                else "refused" * any("refused" in record for record in own),
            ]
        )
    return Table(head, rows)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
