"""A graph in 16 bits still computes the same function, and its time path does not lose a digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qdeploy
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.half import halve, time_only
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import distance
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import denoiser_graph, example_inputs, expected

HALF = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def run(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [
        session.run(None, {"sample": x[None].numpy(), "timestep": t.float().numpy()})[0]
        for x, t in zip(inputs["sample"], inputs["timestep"], strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def write(graph: onnx.ModelProto, path: Path) -> Path:
    onnx.save(graph, path)
    return path


@pytest.mark.parametrize("quantized", [False, True])
def test_half_precision_stays_near(tmp_path: Path, quantized: bool) -> None:
    graph = denoiser_graph(quantized)
    halve(write(graph, tmp_path / "full.onnx"), tmp_path / "half.onnx", "f16")
    inputs = example_inputs()
    near = distance(run(tmp_path / "half.onnx", inputs), expected(graph, inputs))["pooled_db"]
    # 11 bits of mantissa give 66 dB a rounding; an activation that lands on the next int8 code costs more
    assert near > (40 if quantized else 55)


@pytest.mark.parametrize("precision", HALF)
def test_every_operand_has_one_type(tmp_path: Path, precision: str) -> None:
    graph = denoiser_graph(True)
    halve(write(graph, tmp_path / "full.onnx"), tmp_path / "half.onnx", precision)
    half = onnx.load(tmp_path / "half.onnx")
    # onnx's strict inference is the nearest thing to TensorRT's strong typing
    if precision == "f16":  # until opset 22 onnx's Conv knows no bfloat16; TensorRT's does
        onnx.checker.check_model(half)
    strict = precision == "f16"
    inferred = onnx.shape_inference.infer_shapes(half, check_type=strict, strict_mode=strict)
    types = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.value_info}
    weighted = [node for node in half.graph.node if node.op_type in ("Conv", "MatMul")]
    assert weighted
    assert all(types[node.output[0]] == HALF[precision] for node in weighted)


def test_inputs_outputs_integers_and_names_are_kept(tmp_path: Path) -> None:
    source = write(denoiser_graph(True), tmp_path / "full.onnx")
    halve(source, tmp_path / "half.onnx", "f16")
    before, after = read_graph(source), read_graph(tmp_path / "half.onnx")
    assert (before.inputs, before.outputs, before.low_bit) == (after.inputs, after.outputs, after.low_bit)
    names = {node.name for node in onnx.load(tmp_path / "half.onnx").graph.node}
    assert {node.name for node in denoiser_graph(True).graph.node} <= names
    codes = [x for x in onnx.load(tmp_path / "half.onnx").graph.initializer if x.name.endswith(".codes")]
    assert codes
    assert all(tensor.data_type == TensorProto.INT8 for tensor in codes)


def sinusoid() -> onnx.ModelProto:
    """The sine of the timestep times a frequency, added to the sample."""
    nodes = [
        helper.make_node("Mul", ["timestep", "frequency"], ["angle"], name="angle"),
        helper.make_node("Sin", ["angle"], ["wave"], name="wave"),
        helper.make_node("Add", ["sample", "wave"], ["out_sample"], name="add"),
    ]
    shape = ["batch", 3, 6, 6]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(0.987), "frequency")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("precision", ["f16"])
def test_the_time_path_keeps_its_digits(tmp_path: Path, precision: str) -> None:
    graph = sinusoid()
    assert {node.name for node in time_only(ir.from_proto(graph).graph)} == {"angle", "wave"}
    halve(write(graph, tmp_path / "full.onnx"), tmp_path / "half.onnx", precision)
    inputs = {"sample": torch.zeros(1, 3, 6, 6), "timestep": torch.tensor([999.0])}
    result = run(tmp_path / "half.onnx", inputs)
    exact = np.sin(999.0 * np.float64(np.float32(0.987)))
    assert abs(result[0, 0, 0, 0].item() - exact) < 1e-3
    # computed in half precision the angle would be off by up to 0.25
    assert abs(np.sin(np.float64(np.float16(999.0) * np.float16(0.987))) - exact) > 1e-2


@pytest.mark.slow
def test_an_exported_network_stays_near_and_keeps_its_time_path(ddpm: Path, tmp_path: Path) -> None:
    bundle = qdeploy.export(str(ddpm), tmp_path / "onnx")
    halve(bundle.file("unet/model.onnx"), tmp_path / "half.onnx", "f16")
    inputs, reference, _ = read_probe(bundle.path)
    assert distance(run(tmp_path / "half.onnx", inputs), reference)["pooled_db"] > 50
    # the exporter expands the timestep to the batch: that must not draw it into half precision
    model = onnx.load(tmp_path / "half.onnx")
    casts = [
        node for node in model.graph.node if node.op_type == "Cast" and node.name.endswith("/to_f16/cast")
    ]
    assert "timestep" not in {node.input[0] for node in casts}
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    waves = [node.output[0] for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    assert waves
    assert {types[name] for name in waves} == {TensorProto.FLOAT}


def test_an_output_that_is_also_read_inside_keeps_both_types(tmp_path: Path) -> None:
    shape = ["batch", 3, 6, 6]
    names = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("sample", "x", "y")
    }
    nodes = [
        helper.make_node("Neg", ["sample"], ["x"], name="neg"),
        helper.make_node("Add", ["x", "sample"], ["y"], name="add"),
    ]
    graph = helper.make_graph(nodes, "g", [names["sample"]], [names["x"], names["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    halve(write(model, tmp_path / "full.onnx"), tmp_path / "half.onnx", "f16")
    half = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(half, full_check=True)
    add = next(node for node in half.graph.node if node.name == "add")
    assert list(add.input) == ["x/f16", "sample/to_f16"]


def test_numbers_beyond_half_precision_are_refused_and_masks_are_not(tmp_path: Path) -> None:
    for value, precision, refused in ((70000.0, "f16", True), (70000.0, "bf16", False), (None, "f16", False)):
        graph = denoiser_graph(False)
        bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "b_conv")
        values = numpy_helper.to_array(bias).copy()
        values[0] = np.finfo(np.float32).min if value is None else value
        bias.CopyFrom(numpy_helper.from_array(values, "b_conv"))
        source = write(graph, tmp_path / "full.onnx")
        if refused:
            with pytest.raises(InvalidInputError, match="'b_conv' has numbers beyond 65504"):
                halve(source, tmp_path / "half.onnx", precision)
            continue
        halve(source, tmp_path / "half.onnx", precision)
        found = {x.name: x for x in onnx.load(tmp_path / "half.onnx").graph.initializer}
        if value is None:
            assert numpy_helper.to_array(found["b_conv/f16"])[0] == -65504


def test_tiny_scales_stay_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = denoiser_graph(True)
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == "w_conv.scale")
    values = numpy_helper.to_array(scale).copy()
    values[0] = 1e-9
    scale.CopyFrom(numpy_helper.from_array(values, "w_conv.scale"))
    halve(write(graph, tmp_path / "full.onnx"), tmp_path / "half.onnx", "f16")
    found = {x.name: numpy_helper.to_array(x) for x in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert (found["w_conv.scale/f16"] > 0).all()
    assert "1 scales are more than 1% off" in capsys.readouterr().err


def test_bfloat16_is_rounded_to_even_as_torch_does(tmp_path: Path) -> None:
    halve(write(denoiser_graph(False), tmp_path / "full.onnx"), tmp_path / "half.onnx", "bf16")
    weights = {x.name: x for x in denoiser_graph(False).graph.initializer}
    halved = {x.name: x for x in onnx.load(tmp_path / "half.onnx").graph.initializer}
    full = torch.from_numpy(numpy_helper.to_array(weights["w_conv"]).copy())
    bits = torch.frombuffer(bytearray(halved["w_conv/bf16"].raw_data), dtype=torch.bfloat16)
    assert torch.equal(bits.view(full.shape), full.bfloat16())


def quantizer_scales(path: Path) -> dict[str, set[int]]:
    """Types of the scales of Q and DQ, by the operator that reads what they make."""
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found: dict[str, set[int]] = {"Conv": set(), "MatMul": set()}
    for node in model.graph.node:
        for maker in model.graph.node:
            if (
                maker.op_type == "DequantizeLinear"
                and maker.output[0] in node.input
                and node.op_type in found
            ):
                found[node.op_type].add(types[maker.input[1]])
    return found


def test_scales_of_convolutions_stay_float32_where_the_library_takes_them(tmp_path: Path) -> None:
    """As the graph is built for TensorRT for RTX; a product of matrices keeps 16-bit scales."""
    codes = np.random.default_rng(0).integers(-100, 100, (4, 4)).astype(np.int8)
    constants = {
        "step": np.float32(0.0123456789),
        "conv_codes": codes.reshape(4, 4, 1, 1),
        "conv_scale": np.float32(0.0123456789),
        "codes": codes,
        "scales": np.linspace(0.01, 0.02, 4, dtype=np.float32),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["conv_codes", "conv_scale"], ["conv_w"]),
        helper.make_node("Conv", ["d", "conv_w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "step", "zero"], ["cd"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        helper.make_node("MatMul", ["cd", "w"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4, 4, 4]) for name in ("sample", "y")]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "full.onnx")
    halve(tmp_path / "full.onnx", tmp_path / "narrow.onnx", "f16")
    halve(tmp_path / "full.onnx", tmp_path / "wide.onnx", "f16", wide_scales=True)
    half, full = {TensorProto.FLOAT16}, {TensorProto.FLOAT}
    assert quantizer_scales(tmp_path / "narrow.onnx") == {"Conv": half, "MatMul": half}
    assert quantizer_scales(tmp_path / "wide.onnx") == {"Conv": full, "MatMul": half}
    onnx.checker.check_model(onnx.load(tmp_path / "wide.onnx"), full_check=True)
    assert onnx.load(tmp_path / "narrow.onnx").opset_import[0].version == 21
    assert onnx.load(tmp_path / "wide.onnx").opset_import[0].version == 23
