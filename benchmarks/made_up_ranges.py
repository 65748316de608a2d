"""A W8A8 or fp8 graph of a network of random weights without calibrating it, for questions of what an engine moves.

    python -m benchmarks.made_up_ranges runs/sd15-f32 runs/sd15-w8a8 --weights int8
    python -m benchmarks.rtx_builds runs/sd15-f32 runs/sd15-w8a8 --gpu sm89 -o runs/rtx-builds-large.json

Which kernels are built, their types and their bytes do not depend on the ranges, so that none are looked for: every
input has the scale 0.05. Everything else is as in an export for the target ``tensorrt``: one scale for each output
channel of a weight, equal inputs quantized once, shortcuts of concatenations split, first and last layers, time
embeddings and attention in floats. `benchmarks/results/rtx-builds-large.json` has ``sd44`` both ways. The folder that
it writes holds a graph alone, and is no artifact.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer
from qdeploy.export.lint.run import graph_file

STEP = np.float32(0.05)
CODES = {"int8": (np.int8, 127.0), "fp8": (ml_dtypes.float8_e4m3fn, 448.0)}
FLOATS = ("conv_in", "conv_out")


def quantize(model: ir.Model, kind: str) -> int:
    """Put Q/DQ at the inputs and weights of every inner layer; the number of layers."""
    inputs: dict[ir.Value, ir.Value] = {}
    layers = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type in ("Conv", "MatMul") else None
        if weight is None or node.name in FLOATS or constant(weight) is None or constant(weight).ndim < 2:
            continue
        layers += 1
        joined = producer(node.inputs[0])
        write = Writer(model, node)
        if node.op_type == "Conv" and joined is not None and joined.op_type == "Concat":
            _split(write, node, joined, kind, inputs)
            continue
        node.replace_input_with(0, _input(write, node.inputs[0], kind, inputs))
        axis = 0 if node.op_type == "Conv" else 1
        node.replace_input_with(1, _weight(write, constant(weight), axis, kind))
    # Rewrites of the build name values after the node that they belong to, as was done here.
    for number, node in enumerate(model.graph):
        for place, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"value.{number}.{place}"
    return layers


def _input(write: Writer, value: Any, kind: str, inputs: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in inputs:
        step, zero = write.constant(STEP, "step"), write.constant(np.zeros((), CODES[kind][0]), "zero")
        codes = write.node("QuantizeLinear", value, step, zero, shape=value.shape, dtype=zero.dtype)
        inputs[value] = write.node("DequantizeLinear", codes, step, zero, shape=value.shape)
    return inputs[value]


def _weight(write: Writer, weight: Any, axis: int, kind: str) -> ir.Value:
    dtype, largest = CODES[kind]
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scales = np.abs(weight).max(others).astype(np.float32) / np.float32(largest)
    scaled = weight / np.expand_dims(scales, others)
    codes = (np.rint(scaled) if kind == "int8" else scaled).astype(dtype)
    stored = write.constant(codes, "codes")
    return write.node(
        "DequantizeLinear", stored, write.constant(scales, "scales"), shape=codes.shape, axis=axis
    )


def _split(
    write: Writer, node: ir.Node, joined: ir.Node, kind: str, inputs: dict[ir.Value, ir.Value]
) -> None:
    """A convolution for each part of a concatenation, and their sum."""
    weight, first, total = constant(node.inputs[1]), 0, None
    for value in joined.inputs:
        assert value is not None
        assert value.shape is not None
        size = int(value.shape[1])  # type: ignore[arg-type]
        part = _weight(write, np.ascontiguousarray(weight[:, first : first + size]), 0, kind)
        first += size
        quantized = _input(write, value, kind, inputs)
        bias = [node.inputs[2]] if total is None and len(node.inputs) > 2 else []
        result = write.node("Conv", quantized, part, *bias, shape=node.outputs[0].shape)
        total = result if total is None else write.node("Add", total, result, shape=node.outputs[0].shape)
    assert total is not None
    write.replace(node.outputs[0], total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="an unquantized bundle")
    parser.add_argument("target", type=Path, help="a new folder for model.onnx")
    parser.add_argument("--weights", choices=CODES, default="int8")
    arguments = parser.parse_args()
    model = ir.load(graph_file(arguments.source))
    layers = quantize(model, arguments.weights)
    arguments.target.mkdir(parents=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    ir.save(model, arguments.target / "model.onnx", external_data="model.onnx_data")
    print(f"{layers} layers in {arguments.weights}: {arguments.target}")


if __name__ == "__main__":
    main()
