"""What time tables and timestep groups cost: size and latency before and after, side by side in one run.

    python benchmarks/static_graph.py --shape cifar --batch 4 --output runs/static-graph

Engines on OpenVINO: the full-precision network, with its time path as layers and as tables; and, for shapes
that are cheap to calibrate, W8A8 with static scales and with groups of timesteps.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import torch
from torch import Tensor

from benchmarks.models import UNETS, model_folder
from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.measure import repeat_rows
from qdeploy.engines.timing import take_turns
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import example_inputs
from qdeploy.network.roles import find_structure
from qdeploy.store.artifact import Artifact
from qdeploy.store.files import write_json, write_text
from qdeploy.store.probe import read_probe
from qdeploy.system.machine import machine
from qdeploy.system.progress import say, track
from qdeploy.system.tables import MISSING, Table
from qdeploy.workflows.calibrate import calibrate

GROUPS = 4
COLUMNS = [
    "engine",
    "graph nodes",
    "time nodes",
    "MB",
    "ms",
    "beside",
    "speed",
    "int8 convs",
    "worst difference",
]


def engines(shape: str, output: Path, threads: int) -> list[tuple[str, str, Artifact, Artifact]]:
    """Name, rival to be compared with, bundle and engine of each row."""
    model = model_folder(shape, output)
    rows = []

    def add(name: str, rival: str, bundle: Artifact) -> None:
        place = output / f"{shape}-{name}-engine"
        rows.append((name, rival, bundle, build_engine(bundle, place, backend="openvino", threads=threads)))

    def exported(source: Any, name: str, table: str) -> Artifact:
        return export(source, output / f"{shape}-{name}-onnx", time_table=table, components=False)

    for table in ("none", "fp32", "fp16", "int8"):
        name = "fp32" if table == "none" else f"fp32-table-{table}"
        add(name, "" if table == "none" else "fp32", exported(model, name, table))
    if shape == "sd15":
        return rows
    short = {} if shape == "digits" else {"samples": 4, "keep": 20, "steps": 20}
    data = collect(model, output / f"{shape}-set", scheduler="ddim", **short)
    assert isinstance(data, Artifact)
    for groups in (1, GROUPS):
        kind = "w8a8" if groups == 1 else "w8a8-groups"
        checkpoint = calibrate(
            model, output / f"{shape}-{kind}", calibration=data, effort="fast", timestep_groups=groups
        )
        for table in ("none", "fp32"):
            name = kind if table == "none" else f"{kind}-table"
            rival = {
                "w8a8": "",
                "w8a8-table": "w8a8",
                "w8a8-groups": "w8a8",
                "w8a8-groups-table": "w8a8-table",
            }
            add(name, rival[name], exported(checkpoint, name, table))
    return rows


def time_nodes(bundle: Artifact, paths: tuple[str, ...]) -> tuple[int, int]:
    """All nodes of a graph, and the products of the time MLP and the embedding projections among them."""
    file = bundle.path / str(bundle.facts.component) / "model.onnx"
    nodes = onnx.load(file, load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type in ("Gemm", "MatMul", "Conv")]
    return len(nodes), sum(any(n.name == p or n.name.startswith(f"{p}/") for p in paths) for n in products)


def int8_convolutions(artifact: Artifact, inputs: dict[str, Tensor]) -> str:
    """Executed convolutions in int8, of all."""
    with load_engine(artifact) as engine:
        kernels = [k for k in engine.kernels(inputs) if k.kind == "Convolution"]
    return f"{sum(k.precision == 'int8' for k in kernels)} of {len(kernels)}"


def worst_difference(
    before: Artifact, after: Artifact, inputs: dict[str, Tensor], timesteps: Tensor
) -> float:
    """Largest relative difference of two graphs' outputs on ONNX Runtime over timesteps."""
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(
            str(bundle.path / str(bundle.facts.component) / "model.onnx"),
            providers=["CPUExecutionProvider"],
        )
        for bundle in (before, after)
    ]
    row = {name: value[:1].numpy() for name, value in inputs.items() if name != "timestep"}
    worst = 0.0
    for t in track(timesteps.tolist(), "all timesteps"):
        outputs = [
            torch.from_numpy(s.run(None, {**row, "timestep": torch.tensor(float(t)).numpy()})[0])
            for s in sessions
        ]
        worst = max(worst, float((outputs[0] - outputs[1]).norm() / outputs[0].norm()))
    return worst


def main() -> None:
    """Measure, and write ``SHAPE.json`` and ``SHAPE.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=UNETS, default="cifar")
    parser.add_argument("--output", type=Path, default=Path("runs/static-graph"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long the rounds may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timesteps", type=int, default=1000, help="how many to compare outputs at")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = engines(arguments.shape, arguments.output, arguments.threads)
    model = open_model(model_folder(arguments.shape, arguments.output))
    layers = find_structure(model.load(), example_inputs(model, 1)).time.layers
    bundles = {name: bundle for name, _, bundle, _ in rows}
    probe = read_probe(bundles["fp32"].path)[0]
    inputs = repeat_rows(probe, arguments.batch)
    timesteps = torch.linspace(0, 999, arguments.timesteps).round()
    with ExitStack() as stack:
        loaded = {name: stack.enter_context(load_engine(engine)) for name, _, _, engine in rows}
        turns = take_turns(
            loaded, dict.fromkeys(loaded, inputs), arguments.rounds, arguments.seconds, arguments.shape
        )
    cells, records = [], []
    for name, rival, bundle, engine in rows:
        total, named = time_nodes(bundle, layers)
        size = engine.size(str(engine.facts.component)) / 1e6
        ms = median(t for turn in turns[name] for t in turn)
        pairs = zip(turns[name], turns.get(rival, []), strict=False)
        speed = median(median(theirs) / median(own) for own, theirs in pairs) if rival else None
        table = name.startswith("fp32-table-fp32")
        different = worst_difference(bundles["fp32"], bundle, probe, timesteps) if table else None
        record = {
            "engine": name, "nodes": total, "time_nodes": named, "size_mb": round(size, 3), "ms": round(ms, 4),
            "beside": rival, "speed": speed, "int8_convolutions": int8_convolutions(engine, inputs),
            "worst_difference": different,
        }  # fmt: skip
        records.append(record)
        cells.append(
            [
                name, str(total), str(named), f"{size:.2f}", f"{ms:.2f}", rival or MISSING,
                MISSING if speed is None else f"{speed:.3f}x", record["int8_convolutions"],
                MISSING if different is None else f"{different:.1e}",
            ]
        )  # fmt: skip
        say(f"{name}: {ms:.2f} ms")
    note = (
        f"{arguments.shape}, batch {arguments.batch}, {arguments.threads} threads, OpenVINO f32; difference over "
        f"{len(timesteps)} timesteps"
    )
    write_json(
        arguments.output / f"{arguments.shape}.json", {"note": note, "machine": machine(), "rows": records}
    )
    write_text(arguments.output / f"{arguments.shape}.md", f"{Table(COLUMNS, cells).markdown()}\n{note}\n")
    print(Table(COLUMNS, cells).text())
    print(note)


if __name__ == "__main__":
    main()
