"""Engines by TensorRT for RTX of the shipped models at every format that it takes: is all of it low-bit?

    python -m benchmarks.rtx_matrix -o benchmarks/results/rtx-builds.json

Every cell is a model at a format, calibrated on a few rows (what is built does not depend on how good the ranges
are), built twice for one shape and twice for several: are the planned layers low-bit in NVIDIA's own list, and are
the two plans equal byte by byte? Goes under ``matrix`` in the output, whose rows are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.rtx_builds import one_shape
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.tensorrt.builder import build
from qdeploy.engines.tensorrt.flavour import RTX
from qdeploy.engines.tensorrt.gpu_targets import NEEDS
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.export.lint.run import graph_file
from qdeploy.export.run import export
from qdeploy.store.files import write_json
from qdeploy.workflows.calibrate import calibrate

MODELS = ("digits", "digits-dit", "scenes")
BATCH = 2


class Cell(NamedTuple):
    """How a model becomes a bundle.

    Attributes:
        options: of `qdeploy.calibrate`.
        time_table: of `qdeploy.export`.
    """

    options: Mapping[str, str]
    time_table: str = "none"


W8A8 = {"weights": "int8", "activations": "int8"}
FORMATS = {
    "W8A8": Cell(W8A8),
    "W4A8": Cell({"weights": "int4", "activations": "int8"}),
    "fp8": Cell({"weights": "fp8", "activations": "fp8"}),
    "int4 in blocks of 64": Cell({"weights": "int4b64", "activations": "none"}),
    "NVFP4": Cell({"recipe": "nvfp4-minmax"}),
    "W8A8, scales by timestep": Cell(W8A8 | {"timestep_groups": "2"}),
    "W8A8, time table": Cell(W8A8, "fp32"),
}


def made(model: str, cell: Cell, calibration: Path, folder: Path) -> Path:
    """The graph of a cell."""
    checkpoint = calibrate(
        model,
        folder / "checkpoint",
        calibration=calibration,
        method="minmax",
        target="tensorrt",
        **cell.options,
    )
    return graph_file(export(checkpoint, folder / "onnx", components=False, time_table=cell.time_table).path)


def targets_of(graph: Path) -> str:
    """All of SM86, SM89 and SM120 that have the graph's types."""
    least = max((NEEDS[kind] for kind in read_graph(graph).low_bit), default=0)
    return ",".join(f"sm{sm}" for sm in RTX.default_targets if sm >= least)


def measured(graph: Path, shapes: str | None, builds: int = 2) -> dict[str, Any]:
    """What NVIDIA's builder makes of a graph, and whether it makes the same again.

    Args:
        graph: the file.
        shapes: see `qdeploy.engines.tensorrt.profiles.parse_shapes`; from one sample to twice the batch if None.
        builds: how often.
    """
    plans, layers = [], []
    took: dict[str, Any] = {}
    found: dict[str, Any] = {}
    targets = targets_of(graph)
    for _ in range(builds):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            took = build(graph, folder, flavour=RTX, precision="f16", gpu=targets, shapes=shapes, batch=BATCH)
            plans.append((folder / "model.plan").read_bytes())
            found = json.loads((folder / "layers.json").read_text())
            layers.append(found["report"] | {"kernels": len(found["layers"])})
    report = found["report"]
    convolutions = [layer["Name"] for layer in found["layers"] if layer["LayerType"] == "correlation"]
    wide = [name for name in report["float32_results"] if any(name in each for each in convolutions)]
    return {
        "targets": targets,
        **{name: report[name] for name in ("planned", "as_planned", "kinds", "products")},
        "float32_results": len(report["float32_results"]),
        "float32_convolutions": len(wide),
        "kernels": len(found["layers"]),
        "plan_mb": round(len(plans[0]) / 1e6, 2),
        "seconds": took["seconds"],
        "same_layers": all(each == layers[0] for each in layers),
        "differing_bytes": max(differing(plans[0], plan) for plan in plans[1:]) if builds > 1 else None,
    }


def differing(one: bytes, other: bytes) -> int:
    """In how many bytes two plans differ; a plan's end that the other lacks counts too."""
    return abs(len(one) - len(other)) + sum(x != y for x, y in zip(one, other, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=tuple(FORMATS))
    parser.add_argument("--folder", type=Path, default=Path("runs/rtx-matrix"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    content: dict[str, Any] = {}
    if arguments.output.is_file():
        content = json.loads(arguments.output.read_text())
    content |= {"library": f"{RTX.backend} {load_tensorrt(RTX).__version__}", "batch": BATCH}
    rows: list[dict[str, Any]] = content.setdefault("matrix", [])
    kept = {(row["model"], row["format"], row["shapes"]) for row in rows}
    for model in arguments.models:
        data = collect(model, arguments.folder / f"{model}-set", keep=5, samples=4, steps=10).path
        for name in arguments.formats:
            todo = [shapes for shapes in ("one", "several") if (model, name, shapes) not in kept]
            with TemporaryDirectory() as scratch:
                graph = made(model, FORMATS[name], data, Path(scratch)) if todo else Path()
                for shapes in todo:
                    found = measured(graph, one_shape(graph, BATCH) if shapes == "one" else None)
                    rows.append({"model": model, "format": name, "shapes": shapes, **found})
                    write_json(arguments.output, content)
                    said = f"{found['as_planned']} of {found['planned']}, {found['differing_bytes']} bytes differ"
                    print(f"{model}, {name}, {shapes}: {said}", flush=True)


if __name__ == "__main__":
    main()
