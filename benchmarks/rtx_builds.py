"""Engines by TensorRT for RTX of ONNX bundles: time, memory, size, low-bit share and bytes moved, without a GPU.

    python -m benchmarks.rtx_builds digits-w8a8 digits-f32 --gpu sm86,sm89,sm120 -o benchmarks/results/rtx-builds.json
    python -m benchmarks.rtx_builds digits-w8a8 --several -o benchmarks/results/rtx-builds.json
    python -m benchmarks.rtx_builds sd15-w8a8 --builds 1 --gpu sm89 -o benchmarks/results/rtx-builds-large.json

Each bundle is built for one shape, twice: the two plans must be equal byte by byte. ``--several`` builds for the
default profile of several batch sizes instead, whose bytes are not exact. Rows of other bundles in the output stay.

``kernels`` has the bytes of activations by what a kernel is: convolutions, linear layers, attention, norms (with
whatever is fused into them), kernels that do nothing but round to low bits, those that do nothing but move, and other
pointwise ones.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.builder import build
from qdeploy.engines.tensorrt.flavour import RTX
from qdeploy.engines.tensorrt.gpu_targets import NEEDS, parse_gpus
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.traffic import bytes_moved
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


# Myelin's names for operations, as they stand in the names of its kernels.
_MOVES = "Move|Resh|Tran|Conc|Slic|Resi|Repl|Gath"
_ROUNDS = re.compile(rf"({_MOVES}|Cast)*(Mul(MinMaxRoun)?Cast)({_MOVES})*")


def kind_of(layer: dict[str, Any]) -> str:
    """What a kernel is, by its name."""
    name = layer["Name"]
    operations = re.sub(r"_myl\d+_\d+$", "", name).removeprefix("__myl_")
    if layer["LayerType"] == "correlation":
        return "convolutions"
    if layer["LayerType"] == "gemm" or re.match(r"Fc(?![a-z])", operations):
        return "linear layers"
    if "mha" in name:
        return "attention"
    if re.search("Gnor|Inor|Mean", operations):
        return "norms"
    if _ROUNDS.fullmatch(operations):
        return "rounding alone"
    return "moves alone" if re.fullmatch(f"({_MOVES}|Cast)*", operations) else "pointwise"


def by_kernel(layers: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """Megabytes of activations by `kind_of` kernel."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(kind_of(layer), []).append(layer)
    return {
        kind: round(sum(bytes_moved(group, batch)["activations"].values()) / 1e6, 3)
        for kind, group in sorted(groups.items())
    }


def measure(bundle: Path, gpu: str, batch: int, builds: int, several: bool = False) -> dict[str, Any]:
    """Build a bundle's denoiser; two builds must agree."""
    graph = bundle / "model.onnx"
    if not graph.is_file():
        graph = graph_file(bundle)
    least = max((NEEDS[kind] for kind in read_graph(graph).low_bit), default=0)
    targets = ",".join(f"sm{sm}" for sm in parse_gpus(gpu, RTX) if sm >= least)
    plans: set[str] = set()
    took: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(builds):
            folder = Path(scratch) / str(number)
            shapes = None if several else one_shape(graph, batch) or None
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
        "kernels": by_kernel(found["layers"], batch),
        "layers": len(found["layers"]),
        "byte_identical": None if builds == 1 or several else len(plans) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--gpu", default="sm86,sm89,sm120")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--builds", type=int, default=2)
    parser.add_argument("--several", action="store_true", help="build for the default profile of shapes")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.output.is_file():
        results = json.loads(arguments.output.read_text())
    results |= {"library": f"{RTX.backend} {load_tensorrt(RTX).__version__}", "batch": arguments.batch}
    results.setdefault("bundles", {})
    print(
        "| bundle | targets | s | MB | engine MB | as planned | float32 results | activations MB | moved MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for bundle in arguments.bundles:
        key = bundle.name + (", several shapes" if arguments.several else "")
        try:
            found = measure(bundle, arguments.gpu, arguments.batch, arguments.builds, arguments.several)
        except QDeployError as error:
            results["bundles"][key] = {"error": str(error)}
            print(f"| {key} | {error} |", flush=True)
        else:
            results["bundles"][key] = found
            cells = [
                key, found["targets"], found["seconds"], found["peak_mb"], found["plan_mb"],
                f"{found['as_planned']}/{found['planned']}", found["float32_results"], found["activations_mb"],
                found["moved_mb"],
            ]  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
