"""What OpenVINO makes of a graph after our rewrites: no detours in memory, statistics in f32, keys as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx.reference import ReferenceEvaluator

from qdeploy.engines import openvino_graph as converter
from qdeploy.system.machine import has_bf16

RANDOM = np.random.default_rng(3)
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CHANNELS, SIZE = 32, 16

BLOCK = f"""
agraph (float[N,{CHANNELS},{SIZE},{SIZE}] x) => (float[N,{CHANNELS},{SIZE},{SIZE}] y)
<float scale = {{0.05}}, int8 zero = {{0}}> {{
    q0 = QuantizeLinear (x, scale, zero)
    d0 = DequantizeLinear (q0, scale, zero)
    w0 = DequantizeLinear <axis = 0> (codes0, steps)
    c0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d0, w0, bias)
    n = GroupNormalization <num_groups = 8, epsilon = 0.00001> (c0, gamma, beta)
    g = Sigmoid (n)
    s = Mul (n, g)
    q1 = QuantizeLinear (s, scale, zero)
    d1 = DequantizeLinear (q1, scale, zero)
    w1 = DequantizeLinear <axis = 0> (codes1, steps)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d1, w1)
}}"""

ATTENTION = """
agraph (float[2,4,8,16] q, float[2,4,8,16] k) => (float[2,4,8,8] y) <float[1] f = {0.5}> {
    t = Transpose <perm = [0, 1, 3, 2]> (k)
    a = Mul (q, f)
    b = Mul (t, f)
    m = MatMul (a, b)
    y = Softmax <axis = -1> (m)
}"""


def block(path: Path, offset: float) -> onnx.ModelProto:
    """Two int8 convolutions with norm and SiLU between them; the first one's bias shifts its output."""
    model = onnx.parser.parse_model(HEAD + BLOCK)
    codes = (CHANNELS, CHANNELS, 3, 3)
    arrays = {
        "codes0": RANDOM.integers(-63, 64, codes).astype(np.int8),
        "codes1": RANDOM.integers(-63, 64, codes).astype(np.int8),
        "steps": np.full(CHANNELS, 1e-3, np.float32),
        "bias": np.full(CHANNELS, offset, np.float32),
        "gamma": RANDOM.normal(size=CHANNELS).astype(np.float32),
        "beta": RANDOM.normal(size=CHANNELS).astype(np.float32),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}/{index}"
    model = onnx.shape_inference.infer_shapes(model)
    shaped = onnx.helper.make_tensor_value_info("c0", onnx.TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])
    if not any(info.name == "c0" for info in model.graph.value_info):
        model.graph.value_info.append(shaped)
    onnx.save(model, path)
    return model


def compiled(ir: Path, rows: int, precision: str) -> Any:
    core = openvino.Core()
    model = core.read_model(ir)
    model.reshape({port: [rows, *list(port.partial_shape)[1:]] for port in model.inputs})
    return core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    )


def kernels(compiled_model: Any) -> list[str]:
    told = (op.get_rt_info() for op in compiled_model.get_runtime_model().get_ordered_ops())
    return [str(info["layerType"].astype(str)) for info in told]


def test_between_two_convolutions_nothing_is_reordered(tmp_path: Path) -> None:
    block(tmp_path / "model.onnx", 0.0)
    converter.build(tmp_path / "model.onnx", tmp_path / "ir")
    made = compiled(tmp_path / "ir" / converter.MODEL, 2, "f32")
    order = kernels(made)
    first, second = (index for index, kind in enumerate(order) if kind == "Convolution")
    assert set(order[first:second]).isdisjoint({"Transpose", "MVN"})
    ops = made.get_runtime_model().get_ordered_ops()[first:second]
    moved = [op for op in ops if op.get_rt_info()["layerType"].astype(str) == "Reorder"]
    assert all(np.prod(list(op.output(0).shape)) <= 2 * CHANNELS for op in moved)


def test_the_block_computes_what_the_graph_says(tmp_path: Path) -> None:
    model = block(tmp_path / "model.onnx", 1.0)
    converter.build(tmp_path / "model.onnx", tmp_path / "ir")
    x = RANDOM.normal(size=(2, CHANNELS, SIZE, SIZE)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    found = compiled(tmp_path / "ir" / converter.MODEL, 2, "f32")([x])[0]
    # a rounding that falls to the other side shifts a few outputs by a step
    assert np.square(found - expected).mean() < 1e-5 * np.square(expected).mean()


@pytest.mark.parametrize("linked", [True, False])
def test_weights_in_a_file_beside_the_graph_are_found(
    tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rewritten graph lies on another file system."""
    if not linked:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    plain, beside = tmp_path / "plain", tmp_path / "beside"
    plain.mkdir(), beside.mkdir()
    model = block(plain / "model.onnx", 1.0)
    onnx.save(model, beside / "model.onnx", save_as_external_data=True, location="blob", size_threshold=0)
    for folder in (plain, beside):
        converter.build(folder / "model.onnx", folder / "ir")
    assert (plain / "ir/openvino_model.bin").read_bytes() == (beside / "ir/openvino_model.bin").read_bytes()


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bf16")
def test_statistics_stay_in_f32_where_the_rest_is_bf16(tmp_path: Path) -> None:
    """A mean far from 0: bf16 statistics would lose the variance."""
    model = block(tmp_path / "model.onnx", 4.0)
    converter.build(tmp_path / "model.onnx", tmp_path / "ir")
    x = RANDOM.normal(size=(2, CHANNELS, SIZE, SIZE)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    ir = tmp_path / "ir" / converter.MODEL
    marked = compiled(ir, 2, "bf16")([x])[0]
    ir.write_text(ir.read_text().replace('<attribute name="precise" version="0" />', ""))
    plain = compiled(ir, 2, "bf16")([x])[0]
    errors = [np.square(found - expected).mean() / np.square(expected).mean() for found in (marked, plain)]
    assert errors[0] < 3e-3
    assert errors[1] > 3 * errors[0]


def test_keys_are_read_as_they_are(tmp_path: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + ATTENTION))
    onnx.save(model, tmp_path / "model.onnx")
    converter.build(tmp_path / "model.onnx", tmp_path / "ir")
    read = openvino.Core().read_model(tmp_path / "ir" / converter.MODEL)
    kinds = [op.get_type_name() for op in read.get_ops()]
    assert "Transpose" not in kinds
    assert kinds.count("Multiply") == 1
    q, k = RANDOM.normal(size=(2, 2, 4, 8, 16)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"q": q, "k": k})
    found = compiled(tmp_path / "ir" / converter.MODEL, 2, "f32")({"q": q, "k": k})[0]
    assert np.abs(found - expected).max() < 1e-6
