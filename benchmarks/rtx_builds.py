"""Engines by TensorRT for RTX of ONNX bundles: time, memory, size, low-bit share and bytes moved, without a GPU.

    python benchmarks/rtx_builds.py onnx-digits-* --gpu sm86,sm89,sm120 -o benchmarks/results/rtx-builds.json

Each bundle is built twice for one shape; the two plans must be equal byte by byte.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.builder import build
from qdeploy.engines.tensorrt.flavour import RTX
from qdeploy.engines.tensorrt.gpu_targets import NEEDS, parse_gpus
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.export.lint.run import graph_file
from qdeploy.store.files import write_json
from qdeploy.system.errors import QDeployError


def one_shape(graph: Path, batch: int) -> str:
    """A profile of one shape."""
    ports = [port for port in read_graph(graph).inputs if port.dynamic]
    return ";".join(
        f"{port.name}:{'x'.join(str(batch if isinstance(size, str) else size) for size in port.shape)}"
        for port in ports
    )


def measure(bundle: Path, gpu: str, batch: int, builds: int) -> dict[str, Any]:
    """Build a bundle's denoiser; two builds must agree."""
    graph = graph_file(bundle)
    least = max((NEEDS[kind] for kind in read_graph(graph).low_bit), default=0)
    targets = ",".join(f"sm{sm}" for sm in parse_gpus(gpu, RTX) if sm >= least)
    plans: set[str] = set()
    took: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(builds):
            folder = Path(scratch) / str(number)
            shapes = one_shape(graph, batch) or None
            took = build(graph, folder, flavour=RTX, precision="f16", gpu=targets, shapes=shapes)
            plans.add(sha256((folder / "model.plan").read_bytes()).hexdigest())
            size = (folder / "model.plan").stat().st_size
            found = json.loads((folder / "layers.json").read_text())
    report = found["report"]
    return {
        "targets": targets,
        "seconds": took["seconds"],
        "peak_mb": round((took["peak_bytes"] or 0) / 1e6),
        "plan_mb": round(size / 1e6, 2),
        "weights_mb": round(sum(found["moved"]["weights"].values()) / 1e6, 3),
        "planned": report["planned"],
        "as_planned": report["as_planned"],
        "kinds": report["kinds"],
        "products": report["products"],
        "float32_results": len(report["float32_results"]),
        "activations_mb": round(sum(found["moved"]["activations"].values()) / 1e6, 3),
        "moved_mb": round(found["moved"]["total"] / 1e6, 3),
        "moved": found["moved"],
        "byte_identical": len(plans) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--gpu", default="sm86,sm89,sm120")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--builds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "library": f"{RTX.backend} {load_tensorrt(RTX).__version__}",
        "batch": arguments.batch,
        "bundles": {},
    }
    print(
        "| bundle | targets | s | MB | engine MB | as planned | float32 results | activations MB | moved MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for bundle in arguments.bundles:
        try:
            found = measure(bundle, arguments.gpu, arguments.batch, arguments.builds)
        except QDeployError as error:
            results["bundles"][bundle.name] = {"error": str(error)}
            print(f"| {bundle.name} | {error} |", flush=True)
        else:
            results["bundles"][bundle.name] = found
            cells = [
                bundle.name, found["targets"], found["seconds"], found["peak_mb"], found["plan_mb"],
                f"{found['as_planned']}/{found['planned']}", found["float32_results"], found["activations_mb"],
                found["moved_mb"],
            ]  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
