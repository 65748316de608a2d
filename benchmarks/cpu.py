"""Who is fastest on this CPU, and at what error: every contender in a process of its own, taking turns.

    python -m benchmarks.cpu --shape cifar --batch 4 --seconds 60 --output runs/cpu
    python -m benchmarks.cpu --shape sd15 --batch 2 --images 1 --steps 8 --held-out 2 --calls 1 --one-at-a-time

All are given the same network and the same calibration set; the error is measured on inputs that no calibration
has seen. Where not all contenders fit into memory together, ``--one-at-a-time`` loads each for its turn and lets it
go. Writes ``SHAPE-bBATCH/results.json``, ``table.md``, ``kernels.md`` and ``speed.png``.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Case, Contender, contenders
from benchmarks.contenders.limits import limits
from benchmarks.contenders.process import Process
from benchmarks.contenders.profile import RUNS
from benchmarks.cpu_report import write_report
from benchmarks.models import SHAPES, model_folder, sampling
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.store.files import write_json, write_tensors
from qdeploy.system.machine import machine
from qdeploy.system.progress import say

LEAST_TURNS = 3
HELD_OUT_SEED = 2**40


def measured_rows(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Held-out inputs, and what full precision in torch makes of them, which is kept beside them."""
    from safetensors.torch import load_file

    data = CalibrationSet.open(case.folder / "held-out")
    inputs = dict(data.inputs(torch.arange(len(data))))
    file = case.folder / f"reference-{data.sha256[:16]}.safetensors"
    if not file.is_file():
        network = open_model(case.model).load()
        with torch.inference_mode():
            rows = [denoise(network, data.inputs([row])) for row in range(len(data))]
        write_tensors(file, {"reference": torch.cat(rows)})
    return inputs, load_file(file)["reference"]


def _size(case: Case, contender: Contender) -> float | None:
    """Megabytes on disk of what a contender loads."""
    names = contender.files
    if not names:
        return None
    total = 0
    for name in names:
        path = case.folder / name
        files = list(path.glob("*/openvino_model.*")) if name.endswith("/") else [path]
        total += sum(file.stat().st_size for file in files)
    return total / 1e6


def prepare(case: Case, names: list[str]) -> dict[str, str]:
    """Let contenders quantize, each in a process of its own, and say of those that cannot why not."""
    known = contenders()
    skipped = {name: reason for name in names if (reason := known[name].obstacle) is not None}
    for name in [name for name in names if name not in skipped and known[name].prepare is not None]:
        say(f"preparing {name}")
        worker, began = Process(name, case, 1), time.perf_counter()
        try:
            reason = worker.ask("prepare")
        except (Exception, EOFError) as error:
            reason = _first_line(error)
        say(f"prepared {name} in {time.perf_counter() - began:.0f} s")
        worker.end()
        if reason is not None:
            skipped[name] = reason
    for name, reason in skipped.items():
        say(f"{name} is left out: {reason}")
    return skipped


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Race:
    """The contenders of a case, with what is known of each.

    Args:
        case: what all are given.
        batch: samples per call.
        calls: timed calls of a turn.
        kernels: whether to ask in the end which kernels ran, and how long.

    Attributes:
        rows: what was measured, by name.
        skipped: why a contender is left out, by name.
    """

    def __init__(self, case: Case, batch: int, calls: int, kernels: bool) -> None:
        self.case, self.batch, self.calls, self.kernels = case, batch, calls, kernels
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self._inputs, self._reference = measured_rows(case)

    def load(self, name: str) -> Process | None:
        """Its process, ready to be timed; None if it fails. Its error is measured the first time."""
        say(f"loading {name}")
        worker = Process(name, self.case, self.batch)
        try:
            loaded = worker.ask("load", self._inputs)
            if name not in self.rows:
                outputs = torch.from_numpy(worker.ask("outputs", len(self._reference)))
                self.rows[name] = self._described(name, outputs) | {"load_s": loaded, "turns": []}
        except (Exception, EOFError) as error:
            self.skipped[name] = _first_line(error)
            say(f"{name} is left out: {self.skipped[name]}")
            worker.end()
            return None
        return worker

    def _described(self, name: str, outputs: Tensor) -> dict[str, Any]:
        signal, noise = powers_by_row(outputs, self._reference)
        decibels = 10 * torch.log10(signal / noise.clamp(min=1e-30))
        contender = contenders()[name]
        return {
            "sqnr_db": float(decibels.median()),
            "sqnr_worst_db": float(decibels.min()),
            "size_mb": _size(self.case, contender),
            "floating": contender.floating,
        }

    def turn(self, name: str, worker: Process) -> None:
        """Time some calls."""
        self.rows[name]["turns"].append(worker.ask("turn", self.calls))

    def leave(self, name: str, worker: Process) -> None:
        """The last questions to a contender."""
        row = self.rows[name]
        row["peak_mb"], row["kernels"] = worker.ask("memory"), None
        try:
            if self.kernels:
                row["kernels"] = worker.ask("kernels", RUNS if self.calls > 1 else 1)
        except Exception as error:
            say(f"the kernels of {name} are unknown: {error}")
        worker.end()

    def results(self) -> dict[str, Any]:
        """All rows with their quantiles, and what the machine can do at best."""
        for row in self.rows.values():
            times, used = zip(*(call for turn in row["turns"] for call in turn), strict=True)
            spread = quantiles(times, n=10)
            row |= {"ms": median(times), "ms_p10": spread[0], "ms_p90": spread[-1], "cpu_ms": median(used)}
        return {"rows": self.rows, "skipped": self.skipped, "limits": limits(self.case.threads)}


def measure(race: Race, names: list[str], seconds: float, together: bool) -> dict[str, Any]:
    """Let them compete: in turns of some calls, for about so many seconds, but three turns at least.

    With ``together`` all stay loaded. Without it each is loaded for its turn; there are three turns.
    """
    race.skipped |= prepare(race.case, names)
    order = [name for name in names if name not in race.skipped]
    if not together:
        for number in range(LEAST_TURNS):
            for name in [name for name in order if name not in race.skipped]:
                if (worker := race.load(name)) is None:
                    continue
                race.turn(name, worker)
                if number == LEAST_TURNS - 1:
                    race.leave(name, worker)
                worker.end()
        return race.results()
    running = {name: worker for name in order if (worker := race.load(name)) is not None}
    order, end, turns = list(running), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < LEAST_TURNS:
        for name in order:
            race.turn(name, running[name])
        order.append(order.pop(0))
        turns += 1
    for name, worker in running.items():
        race.leave(name, worker)
    return race.results()


def powers_by_row(output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Power of each row's reference and of its error."""
    reference, error = reference.double().flatten(1), (output.double() - reference.double()).flatten(1)
    return reference.square().sum(1), error.square().sum(1)


def main() -> None:
    """Prepare, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="cifar")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long the turns may take")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of a turn")
    parser.add_argument("--images", type=int, default=4, help="images of the calibration set")
    parser.add_argument("--steps", type=int, default=20, help="denoiser calls of each image that are kept")
    parser.add_argument("--held-out", type=int, default=5, help="denoiser calls to measure the error on")
    parser.add_argument("--ranges", choices=("lp", "minmax"), default="lp", help="qdeploy's finder of ranges")
    parser.add_argument("--one-at-a-time", action="store_true", help="load each for its turn alone")
    parser.add_argument("--no-kernels", action="store_true", help="do not compile again to ask for kernels")
    parser.add_argument("--output", type=Path, default=Path("runs/cpu"))
    parser.add_argument("--modelopt", help="a Python that has ModelOpt")
    parser.add_argument("--prepare", action="store_true", help="quantize and write files, and stop")
    parser.add_argument("--only", nargs="*", help="names of contenders; all by default")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    folder = arguments.output / arguments.shape
    folder.mkdir(parents=True, exist_ok=True)
    model = model_folder(arguments.shape, arguments.output)
    shape, images, steps, held_out = (
        getattr(arguments, name) for name in ("shape", "images", "steps", "held_out")
    )
    collect(model, folder / "set", samples=images, steps=steps, **sampling(shape, steps, False))
    options = sampling(shape, held_out, True)
    collect(model, folder / "held-out", samples=1, steps=held_out, seed=HELD_OUT_SEED, **options)
    export(model, folder / "fp32-onnx", components=False)
    case = Case(arguments.shape, folder, model, arguments.threads, arguments.modelopt, arguments.ranges)
    names = [
        name for name in contenders() if not arguments.only or any(only in name for only in arguments.only)
    ]
    if arguments.prepare:
        prepare(case, names)
        return
    together = not arguments.one_at_a_time
    race = Race(case, arguments.batch, arguments.calls, not arguments.no_kernels)
    found = measure(race, names, arguments.seconds, together)
    found |= {
        "shape": arguments.shape,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "machine": machine(),
    }
    place = folder.with_name(f"{arguments.shape}-b{arguments.batch}")
    place.mkdir(exist_ok=True)
    write_json(place / "results.json", found)
    write_report(found, place)


if __name__ == "__main__":
    main()
