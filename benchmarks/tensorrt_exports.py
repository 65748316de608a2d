"""What `qdeploy export --target tensorrt` writes: rules that fire, parity on ONNX Runtime, size, memory, time.

    python -m benchmarks.tensorrt_exports --shape digits --shape cifar --output runs/tensorrt-exports
    python -m benchmarks.tensorrt_exports --shape sd15 --format w8a8 --kind static

Min-max calibration, a handful of rows: what is exported and at what cost does not depend on how good the ranges
are. The weights of `cifar` and `sd15` are random. Each export has a process of its own, whose peak memory the
system tells; weights that it maps from files count. Its seconds are those of the processor, which do not depend on
what else the machine does. What is there already is not made again, and rows of earlier runs stay in the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import torch

from benchmarks.models import UNETS, model_folder
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.importers import import_qdiffusion
from qdeploy.evaluate.parity import open_subject, rounding_floors
from qdeploy.export.run import export
from qdeploy.model.inputs import example_inputs
from qdeploy.store.artifact import Artifact, Bundle, open_artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import distance
from qdeploy.system.progress import say
from qdeploy.system.tables import Table, number
from qdeploy.workflows.calibrate import calibrate

FORMATS = {
    "w8a8": {"weights": "int8", "activations": "int8"},
    "w4a8": {"weights": "int4", "activations": "int8"},
    "int4": {"weights": "int4b128", "activations": "none"},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "fp32": {},  # the model itself
}
GROUPS = 4
KINDS = ("static", "table", "hoisted")  # hoisted scales are one for each group of timesteps
# Weights alone have no scale that depends on the timestep, and without quantizers there is one export.
IMPOSSIBLE = {"int4": ("hoisted",), "fp32": ("table", "hoisted")}
COLUMNS = (
    "export",
    "E",
    "W",
    "waived",
    "low-bit MACs",
    "parity dB",
    "worst",
    "floor dB",
    "MB",
    "peak GB",
    "CPU s",
)


def calibration_set(shape: str, model: Path, output: Path) -> Artifact:
    """A small one: sampled where the model is trained, of noise where its weights are random."""
    place = output / f"{shape}-set"
    if shape == "digits":
        made = collect(model, place, samples=8, keep=4, steps=4, scheduler="ddim")
        assert isinstance(made, Artifact)
        return made
    from qdeploy.model.folder import open_model

    images = 4 if shape == "cifar" else 1
    inputs = example_inputs(open_model(model), rows=GROUPS * images)
    stacked = {
        new: inputs[old].unflatten(0, (GROUPS, images))
        for new, old in (("xs", "sample"), ("ts", "timestep"), ("cs", "encoder_hidden_states"))
        if old in inputs
    }
    file = output / f"{shape}.pt"
    torch.save(stacked, file)
    return import_qdiffusion(model, file, place, keep=GROUPS, samples=images)


def checkpoint(shape: str, name: str, groups: int, output: Path) -> Path:
    """Calibrate a shape in a format."""
    model = model_folder(shape, output)
    made = calibrate(
        model,
        output / f"{shape}-{name}-{groups}",
        calibration=calibration_set(shape, model, output),
        method="minmax",
        target="tensorrt",
        effort="fast",
        timestep_groups=groups,
        **FORMATS[name],  # type: ignore[arg-type]
    )
    assert isinstance(made, Artifact)
    return made.path


def bundle(source: Path, place: Path, table: str) -> Path:
    """Export a checkpoint, or a model."""
    return export(source, place, target="tensorrt", time_table=table, components=False).path


def parity(path: Path) -> dict[str, Any]:
    """Distance of the graph on ONNX Runtime from the network that it was exported from, over the probe.

    ``floor_db`` is the graph's distance from itself where the sample is nudged (`qdeploy.evaluate.parity`).
    """
    inputs, reference, simulated = read_probe(path)
    expected = reference if simulated is None else simulated
    subject = open_subject(path)
    computed = subject.predict(inputs)
    return distance(computed, expected) | {"floor_db": median(rounding_floors(subject, inputs, computed))}


def alone(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Call a function in a new process: its result, the process's peak memory in bytes, and CPU seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    torch.set_num_threads(1)
    began = time.process_time()
    result = work(*arguments)
    return result, getrusage(RUSAGE_SELF).ru_maxrss * 1024.0, time.process_time() - began


def measure(shape: str, name: str, kind: str, output: Path) -> dict[str, Any]:
    """One row."""
    groups = GROUPS if kind == "hoisted" else 1
    source = model_folder(shape, output)
    if name != "fp32":
        source, _, _ = alone(checkpoint, shape, name, groups, output)
    place = output / f"{shape}-{name}-{kind}-onnx"
    shutil.rmtree(place, ignore_errors=True)  # an interrupted run may have left it
    made, peak, seconds = alone(bundle, source, place, "fp32" if kind == "table" else "none")
    found, _, _ = alone(parity, made)
    artifact = open_artifact(made, Bundle)
    component = made / str(artifact.facts.component)
    weights = sum(tensor.stat().st_size for tensor in model_weights(shape, output))
    return {
        "shape": shape,
        "format": name,
        "kind": kind,
        "lint": artifact.facts.lint and artifact.facts.lint.to_json(),
        "parity": found,
        "bytes": sum(file.stat().st_size for file in component.glob("model.onnx*")),
        "external": (component / "model.onnx_data").exists(),
        "peak": peak,
        "fp32_weights": weights,
        "cpu_seconds": seconds,
    }


def model_weights(shape: str, output: Path) -> list[Path]:
    """Files of a model's weights."""
    from qdeploy.model.folder import open_model

    return open_model(model_folder(shape, output)).weights


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    lint, parity = row["lint"], row["parity"]
    waived = ", ".join(f"{rule} x{count}" for rule, count in lint["waived"].items()) or "none"
    return [
        f"{row['shape']} {row['format']}, {row['kind']}",
        str(lint["counts"]["E"]),
        str(lint["counts"]["W"]),
        waived,
        f"{1 - lint['shares'].get('fp32', 0.0):.0%}",
        number(parity["sqnr_db"], 1),
        number(parity["worst_db"], 1),
        number(parity["floor_db"], 1),
        number(row["bytes"] / 1e6, 1),
        f"{row['peak'] / 1e9:.2f}",
        number(row["cpu_seconds"], 0),
    ]


def main() -> None:
    """Measure, and write ``exports.json`` and ``exports.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=UNETS, action="append")
    parser.add_argument("--format", choices=FORMATS, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--output", type=Path, default=Path("runs/tensorrt-exports"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "exports.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for shape in arguments.shape or UNETS:
        for name in arguments.format or FORMATS:
            for kind in arguments.kind or KINDS:
                key = f"{shape} {name} {kind}"
                if key in rows or kind in IMPOSSIBLE.get(name, ()):
                    continue
                say(f"exporting {key}")
                rows[key] = measure(shape, name, kind, arguments.output)
                write_json(file, rows)
    table = [cells(row) for row in rows.values()]
    write_text(arguments.output / "exports.md", Table(COLUMNS, table).markdown())
    print(Table(COLUMNS, table).text())


if __name__ == "__main__":
    main()
