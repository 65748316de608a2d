"""The table and the picture of what `benchmarks/methods.py` measured."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qdeploy.evaluate.metrics.attributes import ATTRIBUTES
from qdeploy.evaluate.thresholds import look_up
from qdeploy.files import write_json, write_text
from qdeploy.machine import machine
from qdeploy.tables import MISSING, markdown_table

FULL_PRECISION = "full precision"
# Where a value stands in a record, where that of full precision does, and how many digits are shown.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "SQNR dB, median": (("quality", "sqnr_db", "median"), (), 1),
    "worst": (("quality", "sqnr_db", "worst"), (), 1),
    "PSNR dB": (("quality", "psnr_db"), (), 1),
    "FD-local": (("quality", "fd_local", "subject"), ("quality", "fd_local", "reference"), 2),
    "FD to full precision": (("quality", "fd_local", "between"), (), 2),
    **{
        name: (
            ("quality", "attributes", name, "accuracy"),
            ("quality", "attributes", name, "of_the_reference"),
            2,
        )
        for name in ATTRIBUTES
    },
    "parity dB": (("parity", "sqnr_db"), (), 1),
    "bits of weights": (("bits", "weights"), (), 2),
    "of activations": (("bits", "activations"), (), 2),
    "minutes": (("minutes",), (), 1),
    "memory MB": (("memory_mb",), (), 0),
    "engine MB": (("engine_mb",), (), 1),
}


def table_of(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, the full-precision model first; without attributes where no network reads them."""
    shown = {
        name: column
        for name, column in COLUMNS.items()
        if name not in ATTRIBUTES or look_up(records[0], column[0]) is not None
    }
    full = [_cell([look_up(records[0], own)] if own else [], digits) for _, own, digits in shown.values()]
    rows = [[FULL_PRECISION, *full, MISSING]]
    for name in dict.fromkeys(record["run"] for record in records):
        members = [record for record in records if record["run"] == name]
        cells = [
            _cell([look_up(record, keys) for record in members], digits) for keys, _, digits in shown.values()
        ]
        engine = "yes" if members[0]["engine_mb"] is not None else "no: simulated"
        rows.append([f"{name} ({len(members)})", *cells, engine])
    return ["model", *shown, "engine"], rows


def _cell(given: list[float | None], digits: int) -> str:
    values = [value for value in given if value is not None]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else MISSING


def write_results(output: Path, records: list[dict[str, Any]], note: str) -> None:
    """``results.json``, ``table.md`` and ``methods.png`` of what there is so far."""
    write_json(output / "results.json", {"note": note, "machine": machine(), "records": records})
    write_text(output / "table.md", f"{markdown_table(*table_of(records))}\n{note}\n")
    _draw(records, output / "methods.png")


def _draw(records: list[dict[str, Any]], file: Path) -> None:
    """Median SQNR of every calibration, by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["run"] for record in records))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        values = [r["quality"]["sqnr_db"] for r in records if r["run"] == name]
        axes.plot([v["median"] for v in values], [place] * len(values), "o", color="C0")
        axes.plot([v["worst"] for v in values], [place] * len(values), "x", color="C3")
    axes.plot([], [], "o", color="C0", label="median over timesteps")
    axes.plot([], [], "x", color="C3", label="worst timestep")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the prediction, dB")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
