"""int8 on ONNX Runtime's CPU provider: its own static quantization beside qdeploy's, in one run.

    python -m benchmarks.onnxruntime_int8 --shape cifar --batch 4 --output runs/onnxruntime-int8

Contenders, all on ONNX Runtime with the same session options: the float graph; ONNX Runtime's static quantization
(QDQ, uint8 activations, int8 weights per channel, min-max) of all operators, its default, and of convolutions and
products alone; qdeploy's W8A8 checkpoint in the portable dialect and in that of ``--target onnxruntime``. All were
calibrated on the same rows. SQNR is against torch in float32 on the probe's rows; latencies are medians over rounds
in which the contenders take turns, and the processor's time of the same calls, which other work on the machine
touches less; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.models import UNETS, model_folder
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.engines.base import Kernel
from qdeploy.engines.int8_share import int8_mac_share, multiplies
from qdeploy.engines.onnxruntime import _kernel
from qdeploy.export.macs import graph_macs
from qdeploy.export.run import export
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import distance
from qdeploy.system.machine import machine
from qdeploy.system.progress import say
from qdeploy.system.tables import Table
from qdeploy.workflows.calibrate import calibrate

OURS, RIVAL = "qdeploy W8A8", "static, all operators"
COLUMNS = [
    "contender",
    "ms",
    "CPU ms",
    "CPU time beside",
    "SQNR dB",
    "worst dB",
    "MB",
    "int8 MACs",
    "products' time",
]
ROWS = (
    10  # of the calibration set, evenly spread, for ONNX Runtime's quantizer: it keeps every tensor of each
)
Feed = dict[str, np.ndarray]


def contenders(shape: str, output: Path) -> tuple[dict[str, Path], Artifact]:
    """Graphs by name, made where they are not there yet; and the bundle whose probe measures them."""
    model = model_folder(shape, output)
    short = {} if shape == "digits" else {"samples": 4, "keep": 20, "steps": 20}
    data = collect(model, output / f"{shape}-set", scheduler="ddim", **short)
    assert isinstance(data, Artifact)
    checkpoint = calibrate(model, output / f"{shape}-w8a8", calibration=data, effort="fast")
    plain = export(model, output / f"{shape}-onnx", components=False)
    bundles = {
        target: export(checkpoint, output / f"{shape}-w8a8-{target}", target=target, components=False)
        for target in ("portable", "onnxruntime")
    }
    graph = _graph(plain)
    return {
        "fp32": graph,
        RIVAL: quantized_by_onnxruntime(graph, data, output / f"{shape}-static-all.onnx", None),
        "static, products only": quantized_by_onnxruntime(
            graph, data, output / f"{shape}-static-products.onnx", ["Conv", "MatMul", "Gemm"]
        ),
        "qdeploy W8A8, portable": _graph(bundles["portable"]),
        OURS: _graph(bundles["onnxruntime"]),
    }, bundles["onnxruntime"]


def _graph(bundle: Artifact) -> Path:
    return bundle.graph


def quantized_by_onnxruntime(graph: Path, data: Artifact, target: Path, operators: list[str] | None) -> Path:
    """What ONNX Runtime's quantizer makes of a float graph, prepared as its documentation asks for."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if target.is_file():
        return target
    rows = CalibrationSet.open(data.path)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            chosen = range(0, len(rows), max(1, len(rows) // ROWS))
            self.feeds: Iterator[Feed] = (feed(rows.inputs([row])) for row in chosen)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=operators,
        )
    return target


def feed(inputs: dict[str, torch.Tensor]) -> Feed:
    """Inputs as sessions take them: the timestep is a scalar, that of the first row."""
    return {
        name: np.asarray(x.flatten()[0].item(), np.float32) if name == "timestep" else x.numpy()
        for name, x in inputs.items()
    }


def session(graph: Path, threads: int, profile: Path | None = None) -> Any:
    """A session as `qdeploy.engines.onnxruntime` opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def executed(graph: Path, inputs: Feed, threads: int, calls: int) -> list[Kernel]:
    """The kernels that run, with their median times."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(graph, threads, Path(folder) / "profile")
        for _ in range(calls + 1):
            profiled.run(None, inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if "op_name" in event.get("args", {}):
            nodes[event["name"]].append(event)
    return [_kernel(same) for same in nodes.values()]


def turns(
    graphs: dict[str, Path], inputs: Feed, threads: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Wall time and the processor's time of calls in ms, by contender and round."""
    loaded = {name: session(graph, threads) for name, graph in graphs.items()}
    for one in loaded.values():
        one.run(None, inputs)
    took: dict[str, list[tuple[float, float]]] = defaultdict(list)
    order, end = list(loaded), time.perf_counter() + seconds
    while time.perf_counter() < end or len(took[order[0]]) < 3:
        for name in order:
            loaded[name].run(None, inputs)  # the caches are full of the last one's weights
            wall, busy = time.perf_counter(), time.process_time()
            loaded[name].run(None, inputs)
            took[name].append(((time.perf_counter() - wall) * 1e3, (time.process_time() - busy) * 1e3))
        order.append(order.pop(0))
    return took


def main() -> None:
    """Measure, and write ``SHAPE.json`` and ``SHAPE.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=UNETS[:2], default="cifar")
    parser.add_argument("--output", type=Path, default=Path("runs/onnxruntime-int8"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long the rounds take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    graphs, bundle = contenders(arguments.shape, arguments.output)
    if arguments.prepare:
        return
    rows, reference, _ = read_probe(bundle.path)
    inputs = feed({name: x[torch.arange(arguments.batch) % len(x)] for name, x in rows.items()})
    took = turns(graphs, inputs, arguments.threads, arguments.seconds)
    macs = graph_macs(graphs["fp32"], {name: x.shape for name, x in inputs.items()})
    records, cells, kinds = [], [], []
    for name, graph in graphs.items():
        one = session(graph, arguments.threads)
        outputs = [
            torch.from_numpy(one.run(None, feed({n: x[row : row + 1] for n, x in rows.items()}))[0])
            for row in range(len(reference))
        ]
        accuracy = distance(torch.cat(outputs), reference)
        kernels = executed(graph, inputs, arguments.threads, 5)
        own = (
            graph_macs(graph, {n: x.shape for n, x in inputs.items()}) if name.startswith("qdeploy") else macs
        )
        share = int8_mac_share(kernels, own, frozenset())["int8_mac_share"]
        total = sum(kernel.ms or 0.0 for kernel in kernels)
        products = sum(kernel.ms or 0.0 for kernel in kernels if multiplies(kernel))
        by_kind: dict[str, list[float]] = defaultdict(list)
        for kernel in kernels:
            by_kind[kernel.kind].append(kernel.ms or 0.0)
        ranked = sorted(by_kind.items(), key=lambda item: -sum(item[1]))
        ratio = median(theirs[1] / ours[1] for theirs, ours in zip(took[RIVAL], took[name], strict=False))
        record = {
            "contender": name,
            "ms": median(wall for wall, _ in took[name]),
            "cpu_ms": median(busy for _, busy in took[name]),
            "speed_up": ratio,
            "sqnr_db": accuracy["sqnr_db"],
            "worst_db": accuracy["worst_db"],
            "size_mb": graph.stat().st_size / 1e6,
            "int8_mac_share": share,
            "products_time_share": products / total,
            "kernels": {kind: {"count": len(ms), "ms": sum(ms)} for kind, ms in ranked},
            "rounds": len(took[name]),
        }
        records.append(record)
        cells.append(
            [
                name, f"{record['ms']:.1f}", f"{record['cpu_ms']:.1f}", f"{ratio:.2f}x", f"{accuracy['sqnr_db']:.1f}",
                f"{accuracy['worst_db']:.1f}", f"{record['size_mb']:.1f}", f"{share:.0%}", f"{products / total:.0%}",
            ]
        )  # fmt: skip
        top = ", ".join(f"{kind} {sum(ms) / total:.0%}" for kind, ms in ranked[:6])
        kinds.append(f"- {name}: {top}")
        say(f"{name}: {record['cpu_ms']:.1f} ms")
    note = (
        f"{arguments.shape}, batch {arguments.batch}, {arguments.threads} thread(s); 'beside' is the speed over "
        f"'{RIVAL}'; {records[0]['rounds']} rounds"
    )
    write_json(
        arguments.output / f"{arguments.shape}.json", {"note": note, "machine": machine(), "rows": records}
    )
    told = "\n".join(kinds)
    write_text(
        arguments.output / f"{arguments.shape}.md", f"{Table(COLUMNS, cells).markdown()}\n{note}\n\n{told}\n"
    )
    print(Table(COLUMNS, cells).text())
    print(f"{note}\n{told}")


if __name__ == "__main__":
    main()
