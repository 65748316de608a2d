"""Who is fastest on this CPU, and at what error: every contender in a process of its own, taking turns.

    python -m benchmarks.cpu --shape cifar --batch 4 --seconds 60 --output runs/cpu

All are given the same network with random weights and the same calibration set; the error is measured on inputs
that no calibration has seen. Writes ``SHAPE-bBATCH/results.json``, ``table.md``, ``kernels.md`` and ``speed.png``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Case, Contender, contenders
from benchmarks.contenders.limits import limits
from benchmarks.contenders.profile import int8_share, kernel_times
from benchmarks.cpu_report import write_report
from benchmarks.models import SHAPES, model_folder
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.trajectory import collect
from qdeploy.denoiser import open_model
from qdeploy.engines.machine import machine
from qdeploy.export.run import export
from qdeploy.files import write_json
from qdeploy.inputs import denoise
from qdeploy.progress import say

CALLS = 3  # per turn, after one that refills the caches
HELD_OUT_SEED = 2**40


def _measured_rows(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Held-out inputs, and what full precision in torch makes of them."""
    data = CalibrationSet.open(case.folder / "held-out")
    inputs = dict(data.inputs(torch.arange(len(data))))
    network = open_model(case.model).load()
    with torch.inference_mode():
        return inputs, denoise(network, inputs)


def _batch(inputs: dict[str, Tensor], first: int, batch: int) -> dict[str, Tensor]:
    rows = (first + torch.zeros(batch)).long()
    return {
        name: x[first].float().reshape(()) if name == "timestep" else x[rows] for name, x in inputs.items()
    }


def serve(pipe: Connection, name: str, case: Case, batch: int) -> None:
    """A contender's process: answers what it is asked."""
    torch.set_num_threads(case.threads)
    contender = contenders()[name]
    while True:
        question, given = pipe.recv()
        try:
            if question == "prepare":
                pipe.send(contender.prepare(case) if contender.prepare is not None else None)
            elif question == "load":
                inputs, began = given, time.perf_counter()
                loaded = contender.load(case)
                loaded.call(_batch(inputs, 0, batch))
                pipe.send(time.perf_counter() - began)
            elif question == "outputs":
                rows = [loaded.call(_batch(inputs, i, batch))[:1].clone() for i in range(given)]
                pipe.send(torch.cat(rows).numpy())
            elif question == "turn":
                x, took = _batch(inputs, 0, batch), []
                loaded.call(x)
                for _ in range(CALLS):
                    began = time.perf_counter()
                    loaded.call(x)
                    took.append((time.perf_counter() - began) * 1e3)
                pipe.send(took)
            elif question == "memory":
                pipe.send(_peak_megabytes())
            elif question == "kernels":
                told = None
                if loaded.ir is not None:
                    x = _batch(inputs, 0, batch)
                    told = kernel_times(loaded, x, case.threads) | int8_share(loaded, x, case)
                pipe.send(told)
            else:
                return
        except Exception as error:
            pipe.send(error)


def _peak_megabytes() -> float | None:
    """The most memory that this process has held; unlike getrusage's, without what its parent held before."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


class Process:
    """A contender's process, from the parent's side."""

    def __init__(self, name: str, case: Case, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, name, case, batch), daemon=True)
        self._process.start()

    def ask(self, question: str, given: Any = None) -> Any:
        """The answer; raises what the contender raised."""
        self._pipe.send((question, given))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Let the process go."""
        self._pipe.send(("end", None))
        self._process.join(10)
        self._process.kill()


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
    known, skipped = contenders(), {}
    for name in [name for name in names if known[name].prepare is not None]:
        say(f"preparing {name}")
        worker = Process(name, case, 1)
        try:
            reason = worker.ask("prepare")
        except (Exception, EOFError) as error:
            reason = _first_line(error)
        worker.end()
        if reason is not None:
            skipped[name] = reason
            say(f"{name} is left out: {reason}")
    return skipped


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def measure(case: Case, names: list[str], batch: int, seconds: float) -> dict[str, Any]:
    """Let them compete."""
    known, skipped = contenders(), prepare(case, names)
    inputs, reference = _measured_rows(case)
    running: dict[str, Process] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in [name for name in names if name not in skipped]:
        say(f"loading {name}")
        worker = Process(name, case, batch)
        try:
            loaded = worker.ask("load", inputs)
            outputs = torch.from_numpy(worker.ask("outputs", len(reference)))
        except (Exception, EOFError) as error:
            skipped[name] = _first_line(error)
            say(f"{name} is left out: {skipped[name]}")
            worker.end()
            continue
        signal, noise = powers_by_row(outputs, reference)
        decibels = 10 * torch.log10(signal / noise.clamp(min=1e-30))
        rows[name] = {
            "load_s": loaded,
            "sqnr_db": float(decibels.median()),
            "sqnr_worst_db": float(decibels.min()),
            "size_mb": _size(case, known[name]),
            "floating": known[name].floating,
        }
        running[name] = worker
    turns: dict[str, list[list[float]]] = {name: [] for name in running}
    order, end = list(running), time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[order[0]]) < 3:
        for name in order:
            turns[name].append(running[name].ask("turn"))
        order.append(order.pop(0))
    for name, worker in running.items():
        times = [t for turn in turns[name] for t in turn]
        spread = quantiles(times, n=10)
        rows[name] |= {
            "ms": median(times), "ms_p10": spread[0], "ms_p90": spread[-1], "turns": turns[name],
            "peak_mb": worker.ask("memory"),
        }  # fmt: skip
        try:
            rows[name]["kernels"] = worker.ask("kernels")
        except Exception as error:
            rows[name]["kernels"] = None
            say(f"the kernels of {name} are unknown: {error}")
        worker.end()
    return {"rows": rows, "skipped": skipped, "limits": limits(case.threads)}


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
    short = {} if arguments.shape == "digits" else {"scheduler": "ddim", "inference_steps": 20}
    collect(model, folder / "set", samples=4, steps=20, **short)
    collect(model, folder / "held-out", samples=1, steps=5, seed=HELD_OUT_SEED, **short)
    export(model, folder / "fp32-onnx", components=False)
    case = Case(arguments.shape, folder, model, arguments.threads, arguments.modelopt)
    names = [
        name for name in contenders() if not arguments.only or any(only in name for only in arguments.only)
    ]
    if arguments.prepare:
        prepare(case, names)
        return
    found = measure(case, names, arguments.batch, arguments.seconds)
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
