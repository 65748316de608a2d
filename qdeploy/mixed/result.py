"""Short forms of sensitivities and budgets, as a table and as JSON."""

from __future__ import annotations

from typing import Any

from qdeploy.mixed.ranking import TOP, harm_db, read_sensitivity_file, score
from qdeploy.store.artifact import Checkpoint, Sensitivity
from qdeploy.store.bounded_json import read_json_object
from qdeploy.system.tables import Table, number


def read_sensitivity(artifact: Sensitivity) -> dict[str, Any]:
    """The content of ``sensitivity.json``: layers with their harms, most sensitive first."""
    return read_json_object(artifact.report)


def summary(artifact: Sensitivity) -> dict[str, Any]:
    """The extra entries of ``qdeploy sensitivity --json``: rankings, layers, agreement of the passes."""
    report = read_sensitivity(artifact)
    names = ("ranked_by", "formats", "ranking", "agreement", "layers")
    return {name: report[name] for name in names if name in report}


def table(artifact: Sensitivity) -> str:
    """The most sensitive layers, with the SQNR of the prediction when each alone is quantized."""
    report = read_sensitivity(artifact)
    formats, ranked_by = report["formats"], report["ranked_by"]
    columns = ["layer", "weights", *(f"{name}, dB" for name in formats)]
    columns += [f"input {ranked_by['activations']}, dB", "both, first order"]
    rows = []
    for layer in read_sensitivity_file(artifact.report).harms()[:TOP]:
        inputs = layer.best["activations"].get(ranked_by["activations"])
        shown = [layer.best["weights"].get(name) for name in formats]
        cheap = score(layer.cheap, **ranked_by)
        cells = (number(None if harm is None else harm_db(harm), 1) for harm in (*shown, inputs, cheap))
        rows.append([layer.path, str(layer.count), *cells])
    lines = [Table(columns, rows).text()]
    if "agreement" in report:
        found = report["agreement"]
        lines.append(
            f"of the {found['top']} most sensitive layers the cheap pass finds {found['shared']}; Spearman's rank "
            f"correlation over all {len(report['layers'])} layers is {found['spearman']:.3f}"
        )
    return "\n".join(lines)


def budget_summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The extra entries of ``qdeploy calibrate --json`` where formats were chosen within a budget."""
    return {} if checkpoint.budget is None else {"budget": read_json_object(checkpoint.budget)}
