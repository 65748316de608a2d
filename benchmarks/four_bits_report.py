"""The table of what `benchmarks/four_bits.py` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.methods_report import draw_rows
from qdeploy.evaluate.intervals import of_mean
from qdeploy.system.tables import Table

COLUMNS = ("precision", "recipe", "calibrations", "SQNR dB", "worst row dB", "CPU s")


def table(results: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each model's recipe: means over its calibrations, with Student's intervals at 95 %."""
    results = list(results)
    rows = []
    for model, recipe in dict.fromkeys((each["model"], each["recipe"]) for each in results):
        own = [each for each in results if (each["model"], each["recipe"]) == (model, recipe)]
        cells = (_interval([each[key] for each in own]) for key in ("sqnr_db", "worst_db"))
        cost = f"{mean(each['cpu_s'] for each in own):.0f}"
        rows.append([own[0]["precision"], f"{model}, `{recipe}`", str(len(own)), *cells, cost])
    return Table(COLUMNS, rows)


def draw(results: Iterable[Mapping[str, Any]], file: Path) -> None:
    """SQNR of every calibration, by recipe: the median of the rows, and the worst."""
    points: dict[str, list[tuple[float, float]]] = {}
    for each in results:
        name = f"{each['precision']} {each['recipe']}"
        points.setdefault(name, []).append((each["sqnr_db"], each["worst_db"]))
    draw_rows(points, ("median row", "worst row"), file)


def _interval(values: list[float]) -> str:
    found = of_mean(values)
    told = f"{mean(values):.1f}"
    return (
        told if found is None or max(values) == min(values) else f"{told} ({found[0]:.1f} to {found[1]:.1f})"
    )
