"""The view of a graph that lint, rewrites, placement and counts share."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qdeploy.export.graph import MOVES, producer, read, upstream
from qdeploy.export.graph.network import Network
from qdeploy.export.graph.quantizer import dequantized, quantizers
from qdeploy.export.graph.shapes import batch_of_one, infer
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import CHANNELS, SIZE, GraphBuilder, denoiser_graph

CODES = np.random.default_rng(3).integers(-8, 8, (6, 4, 2))


@pytest.mark.parametrize(
    ("kind", "scales", "attributes"),
    [
        (np.int8, (), {}),
        (np.uint8, (), {}),
        (np.int32, (), {}),
        (np.int8, (1,), {"axis": 0}),
        (np.int8, (6,), {"axis": 0}),
        (np.int8, (4,), {}),
        (np.int8, (2,), {"axis": -1}),
        (np.int8, (2, 4, 2), {"axis": 0, "block_size": 3}),
        (ml_dtypes.int4, (6, 2, 2), {"axis": 1, "block_size": 2}),
        (ml_dtypes.float8_e4m3fn, (), {}),
    ],
)
def test_dequantized_constants_are_what_the_standard_computes_bit_for_bit(
    kind: type, scales: tuple[int, ...], attributes: dict[str, int]
) -> None:
    generator = np.random.default_rng(7)
    codes = (CODES + 8 if kind == np.uint8 else CODES * 2**24 if kind == np.int32 else CODES).astype(kind)
    scale = generator.uniform(0.01, 1, scales).astype(np.float32)
    symmetric = kind in (np.int32, ml_dtypes.float8_e4m3fn)  # the standard has no zero points for them
    zero = generator.integers(0, 1 if symmetric else 7, scales).astype(kind)
    node = ir.node(
        "DequantizeLinear",
        [ir.Value(name=name) for name in ("codes", "scale", "zero")],
        attributes,
        outputs=[ir.Value(name="y")],
    )
    values = dict(zip(("codes", "scale", "zero"), (codes, scale, zero), strict=True))
    (expected,) = ReferenceEvaluator(ir.to_proto(node)).run(None, values)
    for value in node.inputs:
        value.const_value = ir.tensor(values[value.name])
        value.shape = ir.Shape(values[value.name].shape)
    (found,) = quantizers(ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 23}), ir_version=10))
    assert np.array_equal(dequantized(found), np.asarray(expected, np.float32))


def test_a_value_that_is_computed_is_not_dequantized(tmp_path: Path) -> None:
    onnx.save(denoiser_graph(True), tmp_path / "model.onnx")
    found = list(quantizers(read(tmp_path / "model.onnx")))
    activations = [q for q in found if not q.quantizes and producer(q.data) is not None]
    assert activations
    assert all(dequantized(q) is None for q in activations)


def test_only_the_dynamic_batch_counts_as_one() -> None:
    graph = GraphBuilder()
    shapes = {"sample": ["batch", 4, "height", 8], "mask": ["batch", "batch"], "timestep": []}
    model = ir.from_proto(graph.model(shapes, graph.add("Neg", ["sample"], "a")))
    assert batch_of_one(model) == {"sample": [1, 4, None, 8], "mask": [1, 1], "timestep": []}


def test_shapes_follow_from_the_inputs_and_the_graph_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(denoiser_graph(True), path)
    model = read(path)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    known = infer(model, {"sample": [3, CHANNELS, SIZE, SIZE], "timestep": []})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    (output,) = model.graph.outputs
    assert known[output.name or ""] == (ir.DataType.FLOAT, (3, CHANNELS, SIZE, SIZE))
    with pytest.raises(InvalidInputError, match="contradict each other"):
        infer(model, {"sample": [1, CHANNELS, SIZE]}, strict=True)


def test_integer_products_have_a_shape_and_a_float_type(tmp_path: Path) -> None:
    graph = GraphBuilder()
    codes = graph.constant("codes", np.ones((64, 32), np.int8))
    zero = graph.constant("zero", np.uint8(0))
    scale = graph.constant("scale", np.float32(1))
    x = graph.add("QuantizeLinear", ["sample", scale, zero], "q")
    y = graph.add("MatMulIntegerToFloat", [x, codes, scale, scale], "product", domain="com.microsoft")
    model = graph.model({"sample": ["batch", 5, 64]}, graph.add("Neg", [y], "last"))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "model.onnx")
    network = Network(tmp_path / "model.onnx", {"sample": [2, 5, 64]})
    product = next(node for node in network.nodes if node.op_type == "MatMulIntegerToFloat")
    assert network.shape(product.outputs[0]) == (2, 5, 32)
    assert network.dtype(product.outputs[0]) == ir.DataType.FLOAT
    assert network.macs() == {"product": 2 * 5 * 32 * 64}


def test_upstream_skips_what_only_moves_numbers() -> None:
    graph = GraphBuilder()
    x = graph.add("Neg", ["sample"], "source")
    shape = graph.constant("shape", np.array([0, -1], np.int64))
    moved = graph.add("Transpose", [graph.add("Reshape", [x, shape], "flat")], "turned")
    model = ir.from_proto(graph.model({"sample": ["batch", 4, 4]}, graph.add("Relu", [moved], "last")))
    last = list(model.graph)[-2]
    found = upstream(last.inputs[0])
    assert found is not None
    assert (found.op_type, found.name) == ("Neg", "source")
    assert "Relu" not in MOVES
    assert upstream(model.graph.inputs[0]) is None


def test_a_graph_without_nodes_or_with_a_cycle_is_refused(tmp_path: Path) -> None:
    model = denoiser_graph(False)
    del model.graph.node[:]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(InvalidInputError, match="holds no node"):
        read(tmp_path / "empty.onnx")
    model = denoiser_graph(False)
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    onnx.save(model, tmp_path / "cycle.onnx")
    with pytest.raises(InvalidInputError, match="no ONNX graph"):
        read(tmp_path / "cycle.onnx")
