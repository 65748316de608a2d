"""All methods on the zoo's ``digits``, on one table: quality, cost, size, and whether an engine exists.

    python benchmarks/methods.py --output runs/methods
    python benchmarks/methods.py --output runs/methods --precisions w4a8 --recipes w4a8-tuned my-recipe.yaml

W8A8 and W4A8 are measured as engines on OpenVINO; W4A6 and W4A4, which no engine runs, as the simulation in
torch. Each calibration is a process of its own, whose largest memory is told. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from qdeploy.artifact import Artifact, open_artifact
from qdeploy.calibrate.methods import methods
from qdeploy.calibrate.trajectory import collect
from qdeploy.denoiser import open_model, read_json
from qdeploy.engines.build import build_engine
from qdeploy.engines.machine import machine
from qdeploy.evaluate.check import check
from qdeploy.evaluate.effective_bits import effective_bits
from qdeploy.evaluate.quality import Plan, Trajectories
from qdeploy.evaluate.remembered import remembered
from qdeploy.evaluate.report import MISSING, markdown_table, text_table
from qdeploy.evaluate.thresholds import look_up
from qdeploy.export.run import export
from qdeploy.files import write_json, write_text
from qdeploy.progress import say
from qdeploy.recipe import resolve_recipe

STEPS = 50
# Formats of weights and activations, and whether an engine runs them.
PRECISIONS = {
    "w8a8": ("int8", "int8", True),
    "w4a8": ("int4", "int8", True),
    "w4a6": ("int4", "int6", False),
    "w4a4": ("int4", "int4", False),
}
COLUMNS = {
    "SQNR dB, median": (("quality", "sqnr_db", "median"), 1),
    "worst": (("quality", "sqnr_db", "worst"), 1),
    "PSNR dB": (("quality", "psnr_db"), 1),
    "FD-local": (("quality", "fd_local", "subject"), 2),
    "FD to full precision": (("quality", "fd_local", "between"), 2),
    "parity dB": (("parity", "sqnr_db"), 1),
    "bits of weights": (("bits", "weights"), 2),
    "of activations": (("bits", "activations"), 2),
    "minutes": (("minutes",), 1),
    "memory MB": (("memory_mb",), 0),
    "engine MB": (("engine_mb",), 1),
}


@dataclass(frozen=True)
class Run:
    """One calibration."""

    precision: str
    method: str
    groups: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.precision}-{self.method}-{self.groups}-{self.seed}"

    @property
    def row(self) -> str:
        """Its row in the table, which it shares with other seeds."""
        return f"{self.precision.upper()} {self.method}" + (
            f", {self.groups} groups" if self.groups > 1 else ""
        )

    @property
    def runs_on_engines(self) -> bool:
        """Whether an engine runs the result."""
        return PRECISIONS[self.precision][2]

    @property
    def options(self) -> list[str]:
        """What `qdeploy calibrate` is told of it."""
        weights, activations, engine = PRECISIONS[self.precision]
        return [
            "--method", self.method, "--weights", weights, "--activations", activations,
            "--timestep-groups", str(self.groups), "--target", "portable" if engine else "simulated",
        ]  # fmt: skip


@dataclass(frozen=True)
class RecipeRun:
    """One calibration by a preset, or by a recipe's file."""

    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.row}-recipe-{self.seed}"

    @property
    def row(self) -> str:
        """Its row in the table, which it shares with other seeds."""
        return Path(self.recipe).stem

    @property
    def runs_on_engines(self) -> bool:
        """Whether an engine runs the result."""
        return not resolve_recipe(self.recipe).simulated()

    @property
    def options(self) -> list[str]:
        """What `qdeploy calibrate` is told of it."""
        return ["--recipe", self.recipe]


def runs(arguments: argparse.Namespace) -> Iterator[Run | RecipeRun]:
    """All calibrations, one seed after the other."""
    for seed in range(arguments.seeds):
        for precision in arguments.precisions:
            for method in arguments.methods:
                for count in arguments.groups:
                    yield Run(precision, method, count, seed)
        for recipe in arguments.recipes:
            yield RecipeRun(recipe, seed)


def calibrated(run: Run | RecipeRun, output: Path, effort: str) -> tuple[Artifact, dict[str, float]]:
    """The checkpoint, and what it cost."""
    data = output / f"set-{run.seed}"
    collect("digits", data, inference_steps=STEPS, scheduler="ddim", seed=1000 * run.seed, batch=32)
    place, cost = output / run.name, output / "cost" / f"{run.name}.json"
    command = [
        sys.executable, "-m", "qdeploy.cli", "calibrate", "digits", "-o", str(place), *run.options,
        "--effort", effort, "--seed", str(run.seed), "--calibration", str(data),
    ]  # fmt: skip
    if not (place.exists() and cost.exists()):
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        seconds = open_artifact(place).manifest["measured"]["seconds"]
        write_json(cost, {"minutes": seconds / 60, "memory_mb": used.ru_maxrss / 1024})
    return open_artifact(place), read_json(cost)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each calibration."""
    model = open_model("digits")
    plan = Plan(samples=arguments.samples, inference_steps=STEPS, batch=32)
    trajectories = cache(lambda: Trajectories(model, plan))
    records = []
    for run in runs(arguments):
        checkpoint, cost = calibrated(run, arguments.output, arguments.effort)
        subject, size = checkpoint, None
        if run.runs_on_engines:
            bundle = export(checkpoint, Path(f"{checkpoint.path}-onnx"))
            subject = build_engine(bundle, Path(f"{checkpoint.path}-engine"), backend="openvino", threads=1)
            files = subject.file(str(subject.facts["component"])).iterdir()
            size = sum(file.stat().st_size for file in files) / 1e6

        def judge(subject: Artifact) -> dict[str, Any]:
            return check(subject, trajectories=trajectories()).to_json()

        file = arguments.output / "measured" / f"{run.name}.json"
        result = remembered(file, [subject.sha256, model.sha256, repr(plan)], partial(judge, subject))
        bits = effective_bits(checkpoint)
        records.append({"run": run.row, "seed": run.seed, **cost, "engine_mb": size, "bits": bits, **result})
        say(f"{run.name}: {result['quality']['sqnr_db']['median']} dB")
        write_results(arguments, records)
    return records


def rows_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table, the full-precision model first."""
    full = records[0]["quality"]["fd_local"]["reference"]
    rows = [
        ["full precision", *[f"{full:.2f}" if name == "FD-local" else MISSING for name in COLUMNS], MISSING]
    ]
    for name in dict.fromkeys(record["run"] for record in records):
        members = [record for record in records if record["run"] == name]
        cells = []
        for keys, digits in COLUMNS.values():
            values = [value for record in members if (value := look_up(record, keys)) is not None]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}" if values else MISSING)
        engine = "yes" if members[0]["engine_mb"] is not None else "no: simulated"
        rows.append([f"{name} ({len(members)})", *cells, engine])
    return rows


def write_results(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """``results.json``, ``table.md`` and a picture of what there is so far."""
    note = (
        f"{arguments.samples} images, DDIM {STEPS} steps, effort {arguments.effort}; mean ± deviation over the "
        "number of calibrations in brackets"
    )
    write_json(arguments.output / "results.json", {"note": note, "machine": machine(), "records": records})
    table = markdown_table(["model", *COLUMNS, "engine"], rows_of(records))
    write_text(arguments.output / "table.md", f"{table}\n{note}\n")
    draw(records, arguments.output / "methods.png")


def draw(records: list[dict[str, Any]], file: Path) -> None:
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


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="*", choices=sorted(methods()), default=sorted(methods()))
    parser.add_argument("--recipes", nargs="+", default=[], help="presets, or recipes' files, beside methods")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], help="groups of timesteps")
    parser.add_argument("--effort", default="fast", choices=("fast", "balanced", "best"))
    parser.add_argument("--seeds", type=int, default=3, help="calibrations of each kind")
    parser.add_argument("--samples", type=int, default=256, help="images that quality is measured on")
    parser.add_argument("--threads", type=int, help="torch's threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (arguments.output / "cost").mkdir(parents=True, exist_ok=True)
    records = measure(arguments)
    print(text_table(["model", *COLUMNS, "engine"], rows_of(records)))


if __name__ == "__main__":
    main()
