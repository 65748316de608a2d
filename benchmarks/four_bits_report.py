"""The table of what `benchmarks/four_bits.py` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(results)
    names = list(dict.fromkeys(f"{each['precision']} {each['recipe']}" for each in results))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
    for key, mark, color, label in (
        ("sqnr_db", "o", "C0", "median row"),
        ("worst_db", "x", "C3", "worst row"),
    ):
        places = [names.index(f"{each['precision']} {each['recipe']}") for each in results]
        axes.plot([each[key] for each in results], places, mark, color=color, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the prediction, dB")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _interval(values: list[float]) -> str:
    found = of_mean(values)
    told = f"{mean(values):.1f}"
    return (
        told if found is None or max(values) == min(values) else f"{told} ({found[0]:.1f} to {found[1]:.1f})"
    )
