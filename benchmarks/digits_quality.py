"""Quality of the methods on the zoo's ``digits``: several calibrations each, measured on the same fresh images.

    python benchmarks/digits_quality.py --output runs/digits-quality

Every calibration has its own seed and its own calibration images, so the spread is that of the whole way from
the model to the engine. What is measured is the engine on OpenVINO. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.check import check
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import CHECKING
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.system.machine import machine
from qdeploy.system.progress import say
from qdeploy.system.tables import MISSING, Table
from qdeploy.workflows.calibrate import calibrate

METHODS = ("minmax", "qdiffusion")
PRECISIONS = ("w8a8", "w4a8")
STEPS = 50
# Columns of the table: where the value is in the result of a check, and how many decimals it is told with.
METRICS = {
    "SQNR dB, median": (("quality", "sqnr_db", "median"), 1),
    "worst": (("quality", "sqnr_db", "worst"), 1),
    "PSNR dB": (("quality", "psnr_db"), 1),
    "drift": (("quality", "drift", "final"), 3),
    "FD-local": (("quality", "fd_local", "subject"), 3),
    "FD to full precision": (("quality", "fd_local", "between"), 3),
    "parity dB": (("parity", "sqnr_db"), 1),
}


def look_up(value: Any, keys: tuple[str, ...]) -> float:
    """The number at nested keys."""
    for key in keys:
        value = value[key]
    return float(value)


def engine_of(output: Path, method: str, precision: str, seed: int, effort: str) -> Artifact:
    """Collect, calibrate, export and build; what an earlier run has finished is taken up."""
    images = 1000 * seed  # sets of different seeds have no image in common
    data = collect("digits", output / f"set-{seed}", steps=STEPS, scheduler="ddim", seed=images, batch=32)
    name = f"{precision}-{method}-{effort}-{seed}"
    recipe = f"{precision}-{method}"
    assert isinstance(data, Artifact)
    checkpoint = calibrate("digits", output / name, recipe=recipe, effort=effort, seed=seed, calibration=data)
    assert isinstance(checkpoint, Artifact)
    bundle = export(checkpoint, output / f"{name}-onnx")
    return build_engine(bundle, output / f"{name}-engine", backend="openvino", threads=1)


def measure(output: Path, efforts: list[str], seeds: int, samples: int) -> list[dict[str, Any]]:
    """One record for each calibration."""
    model = open_model("digits")
    plan = QualityPlan(replace(CHECKING, steps=STEPS, batch=32), samples)
    trajectories = cache(lambda: Trajectories(model, plan))
    runs = []
    for precision, method, effort, seed in product(PRECISIONS, METHODS, efforts, range(seeds)):
        if method == "minmax" and effort != efforts[0]:
            continue  # it does no work that effort could change
        engine = engine_of(output, method, precision, seed, effort)
        file = output / "measured" / f"{engine.path.name}.json"
        key = [engine.sha256, model.sha256, repr(plan)]

        def judge(engine: Artifact) -> dict[str, Any]:
            return check(engine, trajectories=trajectories()).to_json()

        result = cached_result(file, key, partial(judge, engine))
        runs.append({"precision": precision, "method": method, "effort": effort, "seed": seed, **result})
        say(f"{engine.path.name}: median SQNR {result['quality']['sqnr_db']['median']} dB")
    return runs


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over calibrations."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["precision"], run["method"], run["effort"]), []).append(run)
    summary = []
    for (precision, method, effort), members in groups.items():
        record: dict[str, Any] = {"precision": precision, "method": method, "effort": effort}
        record["calibrations"] = len(members)
        for name, (keys, _) in METRICS.items():
            values = [look_up(run, keys) for run in members]
            record[name] = {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None}
        summary.append(record)
    return summary


def table(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, the full-precision model first."""
    columns = ["model", *METRICS]
    full = runs[0]["quality"]["fd_local"]["reference"]
    blank = [f"{full:.3f}" if name == "FD-local" else MISSING for name in METRICS]
    rows = [["full precision", *blank]]
    for record in summarize(runs):
        cells = []
        for name, (_, digits) in METRICS.items():
            value = record[name]
            spread = "" if value["spread"] is None else f" ± {value['spread']:.{digits}f}"
            cells.append(f"{value['mean']:.{digits}f}{spread}")
        effort = "" if record["method"] == "minmax" else f", {record['effort']}"
        rows.append([f"{record['precision'].upper()} {record['method']}{effort}", *cells])
    return columns, rows


def main() -> None:
    """Measure, and write ``results.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/digits-quality"))
    parser.add_argument("--effort", action="append", choices=("fast", "balanced", "best"), help="repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="calibrations of each kind")
    parser.add_argument("--samples", type=int, default=512, help="images that quality is measured on")
    parser.add_argument("--threads", type=int, help="torch's threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = measure(arguments.output, arguments.effort or ["fast"], arguments.seeds, arguments.samples)
    columns, rows = table(runs)
    note = f"{arguments.samples} images, DDIM {STEPS} steps; mean ± deviation over {arguments.seeds} calibrations"
    results = {"note": note, "machine": machine(), "summary": summarize(runs), "runs": runs}
    write_json(arguments.output / "results.json", results)
    text = f"{Table(columns, rows).markdown()}\n{note}\n"
    write_text(arguments.output / "table.md", text)
    print(Table(columns, rows).text())
    print(note)


if __name__ == "__main__":
    main()
