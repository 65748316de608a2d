"""What a rotation and a low-rank branch cost in every call of a layer, on OpenVINO and ONNX Runtime.

    python -m benchmarks.branch_cost --output runs/branch-cost

One linear layer of 1152 features (PixArt's width) by 1152 and by 4608, on 256 tokens, W4A8 as int8 with static
scales: plain, with a rotation in blocks of 32, with a branch of rank 16, and with both. Times are the processor's, on
one thread, medians of calls that take turns. Also: how near the layer without quantizers is to the original, and the
graph to the simulation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.branch_cost_report import table
from benchmarks.turns import cpu_ms
from qdeploy.calibrate.methods.svdquant import split_off
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.quant.basis import hadamard
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import freeze
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.recipe.formats import int4, int8
from qdeploy.store.files import write_json
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.machine import machine

TOKENS, WIDTH, BLOCK, RANK = 256, 1152, 32, 16
KINDS = {"plain": (False, False), "rotation": (True, False), "branch": (False, True), "both": (True, True)}


def layer_of(outputs: int, rotated: bool, branch: bool) -> tuple[QuantizedLayer, Tensor, float]:
    """A calibrated layer, its input, and the SQNR in dB of the layer without quantizers to the original."""
    torch.manual_seed(0)
    inner, x = nn.Linear(WIDTH, outputs).requires_grad_(False), torch.randn(1, TOKENS, WIDTH)
    layer = QuantizedLayer(inner, int4, int8)
    if branch:
        split_off(layer, RANK)
    if rotated:
        layer.rotation = hadamard(BLOCK)
    owned = layer.weight_quantizers, layer.input_quantizers
    layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
    exact = sqnr_by_row(layer(x), inner(x))[0]
    layer.weight_quantizers, layer.input_quantizers = owned
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, int4))
        quantizer.codes = quantizer.nearest(weight)
    (part,) = layer.input_parts(x)
    layer.activation_quantizers[0].set(*to_scale(part.min(), part.max(), int8))
    return layer, x, exact


def opened(file: Path, backend: str) -> Callable[[np.ndarray[Any, Any]], Any]:
    """A graph on a runtime, on one thread."""
    if backend == "openvino":
        import openvino

        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(file), "CPU", options)
        return lambda x: compiled([x])[0]
    import onnxruntime

    plain = onnxruntime.SessionOptions()
    plain.intra_op_num_threads = plain.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, plain, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def run(outputs: int, folder: Path, calls: int) -> list[dict[str, Any]]:
    """All kinds of a layer on both runtimes; their calls take turns."""
    rows, runners, x = [], [], np.zeros(0, np.float32)
    for kind, (rotated, branch) in KINDS.items():
        layer, given, exact = layer_of(outputs, rotated, branch)
        simulated, x = layer(given), given.numpy()
        freeze(layer)
        file = folder / f"{outputs}-{kind}.onnx"
        save(lower(export_program(layer, {"x": torch.cat([given, given])}, ("y",)), "portable"), file)
        for backend in ("openvino", "onnxruntime"):
            call = opened(file, backend)
            parity = sqnr_by_row(torch.from_numpy(np.array(call(x))), simulated)[0]
            rows.append(
                {
                    "outputs": outputs,
                    "kind": kind,
                    "backend": backend,
                    "float_db": round(exact, 1),
                    "parity_db": round(parity, 1),
                }
            )
            runners.append(call)
    for row, took in zip(rows, cpu_ms([partial(call, x) for call in runners], calls), strict=True):
        row["cpu_ms"] = took
    return rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/branch-cost"))
    parser.add_argument("--calls", type=int, default=100)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = [row for outputs in (WIDTH, 4 * WIDTH) for row in run(outputs, asked.output, asked.calls)]
    write_json(asked.output / "branch-cost.json", {"machine": machine(), "results": results})
    print(table(results).markdown())


if __name__ == "__main__":
    main()
