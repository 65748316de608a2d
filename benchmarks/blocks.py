"""Weights in blocks beside full precision and bf16: size, memory, load time, speed, and parity with the simulation.

    python -m benchmarks.blocks --shape digits-dit --shape pixart --output runs/blocks
    python -m benchmarks.blocks --shape pixart-xl --presets w4-blocks --calls 5  # 611 million parameters

For each model: engines of the float graph in f32 and bf16 on OpenVINO and in f32 on ONNX Runtime, and of the presets
`w4-blocks` and `w8-weights` likewise. Each engine is opened and run in a process of its own, on one thread. "MB in
memory" is what the process holds more after the first call than before it opened the engine, mapped files included.
Times are the processor's, medians of calls, since other work on the machine touches them less. SQNR is against torch
in float32 on the probe's rows, parity against the simulation that the checkpoint carries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.blocks_report import table
from benchmarks.models import model_folder
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.export.run import export
from qdeploy.store.artifact import Checkpoint, EngineFolder, open_artifact
from qdeploy.store.files import write_json
from qdeploy.system.machine import machine
from qdeploy.system.memory import STATUS
from qdeploy.system.progress import say
from qdeploy.workflows.calibrate import calibrate

PRESETS = ("w4-blocks", "w8-weights")
RUNTIMES = (("openvino", "f32"), ("openvino", "bf16"), ("onnxruntime", "f32"))
CALLS = 15


def measure(engine: Path, calls: int) -> dict[str, float]:
    """Open an engine and run it: in a process that has done nothing else."""
    import torch

    from qdeploy.engines.measure import repeat_rows
    from qdeploy.store.probe import read_probe

    backend = open_artifact(engine, EngineFolder).facts.backend
    __import__(backend)
    torch.set_num_threads(1)
    inputs, _, _ = read_probe(engine)
    row = repeat_rows(inputs, 1)
    before, began = _resident(), time.process_time()
    with load_engine(engine, threads=1) as loaded:
        loaded(row)
        opened, held = time.process_time() - began, _resident()
        took = []
        for _ in range(calls):
            began = time.process_time()
            loaded(row)
            took.append(time.process_time() - began)
    return {"memory_mb": (held - before) / 1e6, "load_seconds": opened, "cpu_ms": 1e3 * median(took)}


def _resident() -> int:
    """Bytes that this process holds in memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def run(shape: str, folder: Path, presets: Sequence[str], calls: int) -> list[dict[str, Any]]:
    """Build and measure all engines of a model; those that are there already are measured again."""
    model, rows = model_folder(shape, folder), []
    bundles = {"float": export(model, folder / f"{shape}-float-onnx", components=False)}
    for preset in presets:
        checkpoint = calibrate(model, folder / f"{shape}-{preset}", recipe=preset)
        assert isinstance(checkpoint, Checkpoint)
        bundles[preset] = export(checkpoint, folder / f"{shape}-{preset}-onnx", components=False)
    for name, bundle in bundles.items():
        for backend, precision in RUNTIMES:
            place = folder / f"{shape}-{name}-{backend}-{precision}"
            engine = build_engine(bundle, place, backend=backend, precision=precision, threads=1)
            command = [
                sys.executable,
                "-m",
                "benchmarks.blocks",
                "--measure",
                str(place),
                "--calls",
                str(calls),
            ]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found: dict[str, Any] = json.loads(told.splitlines()[-1])
            measured = engine.measured
            found |= {"shape": shape, "weights": name, "backend": backend, "precision": precision}
            found |= {"disk_mb": measured.size_mb, "parity_db": measured.parity.sqnr_db}
            found["sqnr_db"] = _sqnr(place)
            rows.append(found)
            say(
                f"{shape} {name} {backend} {precision}: {found['cpu_ms']:.1f} ms, {found['memory_mb']:.0f} MB"
            )
    return rows


def _sqnr(engine: Path) -> float:
    """Median SQNR of an engine to full precision, over the probe's rows."""
    from qdeploy.engines.measure import row_by_row
    from qdeploy.store.probe import read_probe
    from qdeploy.system.decibels import sqnr_by_row

    inputs, reference, _ = read_probe(engine)
    with load_engine(engine, threads=1) as loaded:
        return round(median(sqnr_by_row(row_by_row(loaded, inputs), reference)), 2)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="digits-dit, scenes, pixart, sd15, ...")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--calls", type=int, default=CALLS, help="that are timed, of each engine")
    parser.add_argument("--output", type=Path, default=Path("runs/blocks"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.calls)))
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for shape in asked.shape or ["digits-dit"]:
        results += run(shape, asked.output, asked.presets, asked.calls)
        write_json(asked.output / "blocks.json", {"machine": machine(), "results": results})
    print(table(results).text())


if __name__ == "__main__":
    main()
