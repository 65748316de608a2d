"""The results of `benchmarks.lost_workers` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdeploy.system.tables import MISSING, Table

FORMS = ("shuffled", "killed", "frozen", "cut off", "ray", "ray killed")


def table(results: Mapping[str, Any]) -> Table:
    """Runs with one process's bytes, of all runs, by verb and form."""
    rows = []
    for verb, found in results.items():
        cells = [
            f"{form['equal']} of {form['runs']}"
            + (f", {form['disturbed']} kills" if name == "ray killed" else "")
            if (form := found.get(name))
            else MISSING
            for name in FORMS
        ]
        rows.append([f"`{verb}`", *cells])
    return Table(["verb", *FORMS], rows)
