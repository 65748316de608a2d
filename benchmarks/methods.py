"""All methods on a zoo model, on one table: quality, cost, size, and whether an engine exists.

    python -m benchmarks.methods --output runs/methods
    python -m benchmarks.methods --output runs/scenes --model scenes --precisions w4a8 --seeds 1
    python -m benchmarks.methods --output runs/methods --precisions w4a8 --recipes w4a8-tuned my-recipe.yaml
    python -m benchmarks.methods --output runs/scenes --model scenes --methods --seeds 1 \\
        --recipes benchmarks/claims/qncd-*.yaml --corrections table online

`claims/` holds recipes that differ in one thing that a paper claims: with and without it.

What OpenVINO takes is measured as an engine, the rest (W4A6 and W4A4, recipes that say "simulated") in torch.
`scenes` is calibrated with prompts of one side of its split and judged with those of the other, with the
share of pictures that show what their prompts ask for. Each calibration is a process of its own, whose largest
memory is told; what needs no data is done once, whatever the number of seeds. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.conditioning import Conditioning
from benchmarks.methods_report import Result, joined, read_results, result_of, table, write_results
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.check import check
from qdeploy.evaluate.effective_bits import effective_bits
from qdeploy.evaluate.parity import measure_parity, open_subject
from qdeploy.evaluate.quality import Trajectories
from qdeploy.export.run import export
from qdeploy.model.folder import open_model, read_json
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import methods
from qdeploy.recipe.targets import find_target
from qdeploy.sampling.correct import CORRECTIONS
from qdeploy.store.artifact import CORRECTION, Artifact, open_artifact
from qdeploy.store.files import write_json
from qdeploy.system.progress import say

BACKEND = "openvino"
# Formats of weights and activations, and what it must run on.
PRECISIONS = {
    "w8a8": ("int8", "int8", "portable"),
    "w4a8": ("int4", "int8", "portable"),
    "w4a6": ("int4", "int6", "simulated"),
    "w4a4": ("int4", "int4", "simulated"),
    "w4a32": ("int4", "none", "portable"),
}
DEFAULT_PRECISIONS = ("w8a8", "w4a8", "w4a6", "w4a4")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Run:
    """One calibration.

    Attributes:
        name: its folder's name.
        row: its row in the table, which it shares with other seeds.
        options: what `qdeploy calibrate` is told of it.
        recipe: what that resolves to.
        seed: of the calibration set and of the calibration.
    """

    name: str
    row: str
    options: tuple[str, ...]
    recipe: Recipe
    seed: int

    @property
    def runs_on_engines(self) -> bool:
        """Whether the backend runs the result."""
        return not self.recipe.simulated() and BACKEND in find_target(self.recipe.target).backends

    @property
    def needs_data(self) -> bool:
        """Whether seeds matter: plain scales of weights come from the weights alone."""
        named = {stage.name for stage in self.recipe.stages}
        return self.recipe.activations != "none" or bool(named - {"weight-ranges", "activation-ranges"})


def of_method(precision: str, method: str, groups: int, seed: int) -> Run:
    """A calibration by a method with its own stages."""
    weights, activations, target = PRECISIONS[precision]
    given: dict[str, Any] = {
        "method": method, "weights": weights, "activations": activations, "timestep_groups": groups,
        "target": target,
    }  # fmt: skip
    row = f"{precision.upper()} {method}" + (f", {groups} groups" if groups > 1 else "")
    options = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    name = f"{precision}-{method}-{groups}-{seed}"
    return Run(name, row, tuple(options), resolve_recipe(**given), seed)


def of_recipe(recipe: str, seed: int) -> Run:
    """A calibration by a preset, or by a recipe's file."""
    row = Path(recipe).stem
    return Run(f"{row}-recipe-{seed}", row, ("--recipe", recipe), resolve_recipe(recipe), seed)


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """All calibrations, one seed after the other."""
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        every = [
            of_method(precision, method, groups, seed)
            for precision in arguments.precisions
            for method in arguments.methods
            for groups in arguments.groups
            if groups == 1 or PRECISIONS[precision][1] != "none"
        ]
        every += [of_recipe(recipe, seed) for recipe in arguments.recipes]
        yield from (run for run in every if seed == arguments.first_seed or run.needs_data)


def timed(file: Path, part: str, place: Path, make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes at ``place``.

    How long that took, and how much of it a processor worked, goes into ``file``, unless it was there already.
    """
    new = not place.exists()
    began, worked = time.perf_counter(), time.process_time()
    made = make()
    if new:
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        known = read_json(file) if file.exists() else {}
        write_json(file, {**known, **{f"{part}_{kind}": round(value, 1) for kind, value in took.items()}})
    return made


def calibrated(run: Run, arguments: argparse.Namespace, conditioning: Conditioning) -> Artifact:
    """The checkpoint; what it cost goes into ``cost/``."""
    output = arguments.output
    data, place, cost = output / f"set-{run.seed}", output / run.name, output / "cost" / f"{run.name}.json"
    timed(
        output / "cost" / f"set-{run.seed}.json",
        "collect",
        data,
        lambda: collect(arguments.model, data, **conditioning.collection(run.seed)),
    )
    command = [
        sys.executable, "-m", "qdeploy.cli", "calibrate", arguments.model, "-o", str(place), *run.options,
        "--effort", arguments.effort, "--seed", str(run.seed), "--calibration", str(data),
    ]  # fmt: skip
    if not (place.exists() and cost.exists()):
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        seconds = open_artifact(place).measured.seconds
        worked = round(used.ru_utime + used.ru_stime, 1)
        write_json(
            cost,
            {"minutes": seconds / 60, "memory_mb": used.ru_maxrss / 1024, "calibrate_cpu_seconds": worked},
        )
    return open_artifact(place)


def graph_parity(bundle: Artifact) -> dict[str, Any]:
    """Of the graph, as ONNX Runtime computes it, with the fake-quantized network."""
    return measure_parity(open_subject(bundle))


def measure(arguments: argparse.Namespace) -> list[Result]:
    """A result for each calibration, and for each correction that is asked for and can be had."""
    model = open_model(arguments.model)
    conditioning = Conditioning.of(model)
    plan = conditioning.plan(arguments.samples)
    note = (
        f"{model.path.name}, {arguments.samples} images, {conditioning}, effort {arguments.effort}; mean ± "
        "deviation over the number of calibrations in brackets"
    )

    @cache
    def trajectories() -> Trajectories:
        found = Trajectories(model, plan)
        began = time.perf_counter()
        for _ in found.reference():
            pass
        say(f"full precision: {time.perf_counter() - began:.0f} s")
        return found

    results = joined(read_results(arguments.beside))
    for run in runs(arguments):
        checkpoint = calibrated(run, arguments, conditioning)
        cost = arguments.output / "cost" / f"{run.name}.json"
        subject, size, graph = checkpoint, None, None
        if run.runs_on_engines:
            place = Path(f"{checkpoint.path}-onnx")
            bundle = timed(cost, "export", place, partial(export, checkpoint, place, components=False))
            place = Path(f"{checkpoint.path}-engine")
            build = partial(build_engine, bundle, place, backend=BACKEND, threads=1)
            subject = timed(cost, "build", place, build)
            size = subject.size(str(subject.facts.component)) / 1e6
            file = arguments.output / "measured" / f"{run.name}-graph.json"
            graph = cached_result(file, [bundle.sha256], partial(graph_parity, bundle))

        def judge(subject: Artifact, correction: str) -> dict[str, Any]:
            return check(subject, trajectories=trajectories(), correction=correction).to_json()

        corrections = ["none"]
        if (checkpoint.path / str(checkpoint.facts.component) / CORRECTION).is_file():
            corrections += [name for name in arguments.corrections if name != "none"]
        for correction in corrections:
            suffix = "" if correction == "none" else f", correction {correction}"
            file = arguments.output / "measured" / f"{run.name}{suffix.replace(', correction ', '-')}.json"
            if not file.exists():
                trajectories()
            key = [subject.sha256, model.sha256, repr(plan), *([correction] if suffix else [])]
            result = timed(
                cost,
                f"check{suffix and '_' + correction}",
                file,
                partial(cached_result, file, key, partial(judge, subject, correction)),
            )
            record = {
                "run": run.row + suffix,
                "seed": run.seed,
                **read_json(cost),
                "engine_mb": size,
                "graph": graph,
                "bits": effective_bits(checkpoint),
                **result,
            }
            results = joined([*results, result_of(record)])
            say(f"{run.name}{suffix}: {result['quality']['sqnr_db']['median']} dB")
        write_results(arguments.output, results, note)
    return results


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--model", default="digits", help="a zoo model, or a folder in the form of one")
    parser.add_argument("--methods", nargs="*", choices=sorted(methods()), default=sorted(methods()))
    parser.add_argument("--recipes", nargs="+", default=[], help="presets, or recipes' files, beside methods")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=DEFAULT_PRECISIONS)
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], help="groups of timesteps")
    parser.add_argument(
        "--corrections", nargs="+", choices=CORRECTIONS, default=[], help="rows more for what holds a table"
    )
    parser.add_argument("--effort", default="fast", choices=("fast", "balanced", "best"))
    parser.add_argument("--seeds", type=int, default=3, help="calibrations of each kind")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="results.json of runs to show too")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first calibration of each kind")
    parser.add_argument("--samples", type=int, default=256, help="images that quality is measured on")
    parser.add_argument("--threads", type=int, help="torch's threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (arguments.output / "cost").mkdir(parents=True, exist_ok=True)
    print(table(measure(arguments)).text())


if __name__ == "__main__":
    main()
