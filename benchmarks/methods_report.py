"""The table and the picture of what `benchmarks/methods.py` measured.

A result is what one calibration shows in the table: ``run``, the row; ``seed``; ``engine``, whether there is
one; ``values`` and ``full``, the columns of it and of the full-precision model; ``counts``, how many pictures
a share is of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qdeploy.evaluate.intervals import of_share
from qdeploy.evaluate.metrics.attributes import ATTRIBUTES
from qdeploy.evaluate.thresholds import look_up
from qdeploy.model.folder import read_json
from qdeploy.store.files import write_json, write_text
from qdeploy.system.machine import machine
from qdeploy.system.tables import MISSING, Table

Result = dict[str, Any]
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
    "in ONNX Runtime": (("graph", "sqnr_db"), (), 1),
    "bits of weights": (("bits", "weights"), (), 2),
    "of activations": (("bits", "activations"), (), 2),
    "minutes": (("minutes",), (), 1),
    "memory MB": (("memory_mb",), (), 0),
    "engine MB": (("engine_mb",), (), 1),
}


def result_of(record: dict[str, Any]) -> Result:
    """What the table shows of a record of `benchmarks/methods.py`."""
    values = {name: look_up(record, own) for name, (own, _, _) in COLUMNS.items()}
    full = {name: look_up(record, theirs) for name, (_, theirs, _) in COLUMNS.items() if theirs}
    counts = {name: look_up(record, ("quality", "attributes", name, "count")) for name in ATTRIBUTES}
    return {
        "run": record["run"],
        "seed": record["seed"],
        "engine": record["engine_mb"] is not None,
        "counts": {name: int(count) for name, count in counts.items() if count},
        "values": {name: value for name, value in values.items() if value is not None},
        "full": {name: value for name, value in full.items() if value is not None},
    }


def read_results(files: Iterable[Path]) -> list[Result]:
    """What `write_results` wrote into some files."""
    return [result for file in files for result in read_json(file)["results"]]


def joined(results: Sequence[Result]) -> list[Result]:
    """The seeds of each row together, rows in order; of one row and seed the last."""
    last = {(result["run"], result["seed"]): result for result in results}
    rows = list(dict.fromkeys(result["run"] for result in results))
    return sorted(last.values(), key=lambda result: (rows.index(result["run"]), result["seed"]))


def table(results: Sequence[Result]) -> Table:
    """A row for each kind of calibration, the full-precision model first; without columns that no result has."""
    shown = [name for name in COLUMNS if any(name in result["values"] for result in results)]
    told = {name: [result for result in results if name in result["full"]][:1] for name in shown}
    rows = [[FULL_PRECISION, *(_cell(name, told[name], "full") for name in shown), MISSING]]
    for run in dict.fromkeys(result["run"] for result in results):
        members = [result for result in results if result["run"] == run]
        engine = "yes" if members[0]["engine"] else "no: simulated"
        rows.append([f"{run} ({len(members)})", *(_cell(name, members, "values") for name in shown), engine])
    return Table(["model", *shown, "engine"], rows)


def _cell(name: str, members: Sequence[Result], side: str) -> str:
    """Mean and deviation over calibrations; of shares the interval that the number of pictures gives."""
    digits = COLUMNS[name][2]
    values = [result[side][name] for result in members if name in result[side]]
    if not values:
        return MISSING
    told = f"{mean(values):.{digits}f}"
    if count := next((result["counts"][name] for result in members if name in result["counts"]), 0):
        low, high = of_share(round(mean(values) * count), count)
        return f"{told} ({low:.{digits}f} to {high:.{digits}f})"
    return told + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def write_results(output: Path, results: Sequence[Result], note: str) -> None:
    """``results.json``, ``table.md`` and ``methods.png`` of what there is so far."""
    write_json(output / "results.json", {"note": note, "machine": machine(), "results": list(results)})
    write_text(output / "table.md", f"{table(results).markdown()}\n{note}\n")
    _draw(results, output / "methods.png")


def _draw(results: Sequence[Result], file: Path) -> None:
    """Median SQNR of every calibration, by row."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        values = result["values"]
        points.setdefault(result["run"], []).append((values["SQNR dB, median"], values["worst"]))
    draw_rows(points, ("median over timesteps", "worst timestep"), file)


def draw_rows(
    points: Mapping[str, Sequence[tuple[float, float]]], labels: tuple[str, str], file: Path
) -> None:
    """A picture of SQNR in dB with a row for each name.

    Args:
        points: of each name, the middle and the worst value of every calibration.
        labels: what the two are.
        file: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(points)), layout="constrained")
    for side, (mark, color) in enumerate((("o", "C0"), ("x", "C3"))):
        values = [pair[side] for pairs in points.values() for pair in pairs]
        places = [place for place, pairs in enumerate(points.values()) for _ in pairs]
        axes.plot(values, places, mark, color=color, label=labels[side])
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the prediction, dB")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
