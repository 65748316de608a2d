"""Graphs in ONNX's own notation, and what a rewrite does to them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import InPlacePass

from tests.helpers import plain_options

Arrays = dict[str, np.ndarray]
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def graph(
    text: str, shapes: dict[str, tuple[int | str, ...]] | None = None, **initializers: np.ndarray
) -> ir.Model:
    """A model from ONNX's own notation; large initializers and inferred shapes come as arguments."""
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for name, array in initializers.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.initializers[name] = value
    for node in model.graph:
        for value in node.outputs:
            if shapes and value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
    return model


def run(model: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, plain_options(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


def random_inputs(model: ir.Model) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        value.name: generator.normal(size=[int(axis) for axis in value.shape]).astype(np.float32)
        for value in model.graph.inputs
        if value.name and value.shape is not None and value.name not in model.graph.initializers
    }


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def fires(rewrite: InPlacePass, model: ir.Model) -> None:
    """The pass changes the graph, says so, changes no result, and has nothing to do the second time."""
    inputs = random_inputs(model)
    before, text = run(model, inputs), ir.to_onnx_text(model)
    assert rewrite(model).modified
    assert ir.to_onnx_text(model) != text
    for first, second in zip(before, run(model, inputs), strict=True):
        assert np.array_equal(first, second)
    assert not rewrite(model).modified


def keeps_away(rewrite: InPlacePass, model: ir.Model) -> None:
    """The pass leaves the graph as it is, and says so."""
    text = ir.to_onnx_text(model)
    assert not rewrite(model).modified
    assert ir.to_onnx_text(model) == text
