"""What rules say beyond their first fixture: severities by version, other ways to break them, near misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

from qdeploy.export.graph.network import Network
from qdeploy.export.lint.forecast import forecast
from qdeploy.export.lint.options import profile_of
from qdeploy.export.lint.report import Finding
from qdeploy.export.lint.run import lint
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.machine import cpu_features
from tests.export.lint.fixtures import (
    BEHIND,
    BOTH,
    CASES,
    CONV,
    CONV1,
    GOOD,
    HALF,
    IMAGE,
    NORM,
    SPLIT,
    TWO,
    WEIGHT,
    copied,
    good,
    graph,
    qdq,
    run,
)


def found(model: onnx.ModelProto, folder: Path, rule: str, **options: str) -> list[Finding]:
    onnx.save(model, folder / "graph.onnx")
    return [f for f in lint(folder / "graph.onnx", **options).findings if f.rule == rule]  # type: ignore[arg-type]


# -- versions and types ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "severity"), [("10.8", "E"), ("11.0", "W")])
def test_a_computed_scale_is_rejected_before_11_and_slow_after(
    version: str, severity: str, tmp_path: Path
) -> None:
    (finding,) = {f.severity for f in found(CASES["TRT005"].failing, tmp_path, "TRT005", tensorrt=version)}
    assert finding == severity


def test_precision_is_an_error_on_a_dq_only(tmp_path: Path) -> None:
    model = good(opset=23, ir=11)
    for node in model.graph.node[:2]:
        node.attribute.append(onnx.helper.make_attribute("precision", 1))
    assert [f.severity for f in found(model, tmp_path, "TRT017")] == ["E", "W"]


def test_codes_without_a_zero_point_say_their_type_themselves(tmp_path: Path) -> None:
    """Only a Q is ambiguous: the standard says uint8. A DQ reads the type of its codes."""
    silent = WEIGHT.replace(", zw", "")
    assert not found(graph(qdq("xd", "x") + silent + CONV), tmp_path, "TRT003")


def test_a_zero_point_may_be_cast_but_not_computed(tmp_path: Path) -> None:
    cast = "zc = Cast<to=3>(ZERO) " + qdq("xd", "x", "s", "zc") + WEIGHT + CONV
    three = graph(cast.replace("ZERO", "two"))
    assert any("zero point 2" in f.message for f in found(three, tmp_path, "TRT001"))
    given = graph(cast.replace("ZERO", "given"), inputs=f"{IMAGE} x, float given")
    assert any("computed" in f.message for f in found(given, tmp_path, "TRT001"))


def test_the_default_axis_is_1(tmp_path: Path) -> None:
    """A weight of 16 by 8 with 16 scales and no axis: they belong to axis 0, and 1 is not as long."""
    model = graph(
        qdq("xd", "x") + "w = DequantizeLinear(half8, sw) " + "y = Conv(xd, w)", inputs="float[1,8,8,8] x"
    )
    codes = np.zeros((16, 8, 1, 1), np.int8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(codes, "half8"))
    (finding,) = found(model, tmp_path, "TRT006")
    assert "16 scales along axis 1" in finding.message


def test_four_bit_tensors_are_even(tmp_path: Path) -> None:
    model = graph(
        "w = DequantizeLinear(odd, s) y = MatMul(x, w)", inputs="float[1,2,3] x", outputs="float[a,b,c] y"
    )
    model.graph.initializer.append(
        onnx.helper.make_tensor("odd", onnx.TensorProto.INT4, (3, 3), range(-4, 5))
    )
    (finding,) = found(model, tmp_path, "TRT013")
    assert "9 codes" in finding.message


def test_an_island_of_fp32_in_half_precision(tmp_path: Path) -> None:
    """A Cast to FLOAT beside a layer of FP16 is a mix of types, if the constant stays FP16."""
    body = "f = Cast<to=1>(x) a = Add(f, h) y = Cast<to=10>(a)"
    assert any("FLOAT and FLOAT16" in f.message for f in found(graph(body, **HALF), tmp_path, "TRT021"))


def test_dynamic_fp4_needs_tensorrt_11_and_blackwell(tmp_path: Path) -> None:
    body = "q, qs = trt.TRT_FP4DynamicQuantize<axis=-1, block_size=16>(x, s) y = Tanh(x)"
    model = graph(body, domains=', "trt" : 1')
    assert not found(model, tmp_path, "TRT042", compute_capability="10.0")
    assert len(found(model, tmp_path, "TRT042", compute_capability="8.9", tensorrt="10.8")) == 2
    assert not found(model, tmp_path, "TRT020")


def test_tensorrts_own_quantizers_count(tmp_path: Path) -> None:
    """ONNX Runtime cannot run them; types and shapes are known all the same."""
    body = "q = trt.TRT_FP8QuantizeLinear(x, s) xd = trt.TRT_FP8DequantizeLinear(q, s) "
    body += "wq = trt.TRT_FP8QuantizeLinear(Wf, s) w = trt.TRT_FP8DequantizeLinear(wq, s) "
    onnx.save(graph(body + CONV, domains=', "trt" : 1'), tmp_path / "graph.onnx")
    report = lint(tmp_path / "graph.onnx", compute_capability="8.9")
    assert {f.rule for f in report.findings if f.severity != "I"} == {"TRT024", "TRT033"}  # 16 channels
    assert report.macs["shares"] == {"fp8": 1.0}
    assert not lint(tmp_path / "graph.onnx", compute_capability="8.6").passed


# -- placement ---------------------------------------------------------------------------------------------


def test_a_float_skip_between_two_quantized_layers(tmp_path: Path) -> None:
    second = qdq("sum", "a", "t") + "y = Conv<pads=[1,1,1,1]>(sum, w)"
    float_skip = qdq("xd", "x") + WEIGHT + CONV1 + "a = Add(y1, x) " + second
    assert "skipped branch is float" in found(graph(float_skip), tmp_path, "TRT028")[0].message
    assert not found(graph(float_skip.replace("Add(y1, x)", "Add(y1, xd)")), tmp_path, "TRT028")
    # Behind a normalization the sum is float in any case.
    normed = float_skip.replace("QuantizeLinear(a,", "QuantizeLinear(n,")
    normed = normed.replace("sum_q =", NORM.replace("y =", "n =").replace("(x", "(a") + " sum_q =")
    assert not found(graph(normed), tmp_path, "TRT028")


def test_a_cast_between_dq_and_layer_makes_it_float(tmp_path: Path) -> None:
    body = qdq("xf", "x") + "xd = Cast<to=10>(xf) w = DequantizeLinear<axis=0>(W8, swh, zw) "
    model = graph(body + "y = Conv<pads=[1,1,1,1]>(xd, w, bh)", outputs="float16[a,b,c,d] y")
    assert "Cast" in found(model, tmp_path, "TRT023")[0].message
    said = forecast(Network(tmp_path / "graph.onnx"))
    assert said.shares == {"fp16": 1.0}
    assert "Cast between the DQ and its input" in said.floats[0].why


# -- shapes ------------------------------------------------------------------------------------------------

SKIP = (
    'd = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) u = Resize<mode="nearest">(d, , scales) '
    "y = Concat<axis=1>(x, u)"
)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ("x:1x16x8x8,4x16x8x8,2x16x8x8", "min <= opt <= max"),
        ("x:1x16x8,1x16x8,1x16x8", "has 4 axes"),
        ("x:1x8x8x8,1x8x8x8,1x8x8x8", "axis 1 is 16 in the graph"),
        ("x:1x16x8x8,1x16x8x8,1x16x8x7", "the max shapes do not fit"),
        ("x:1x16x8x8,1x16x8x8,1x16x8x8;n:1,1,1", "names no input"),
    ],
)
def test_profiles_that_a_builder_would_refuse(shapes: str, words: str, tmp_path: Path) -> None:
    model = graph(SKIP, inputs="float[N,16,H,W] x")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales"))
    assert any(words in f.message for f in found(model, tmp_path, "TRT035", shapes=shapes))
    assert not found(model, tmp_path, "TRT035", shapes="x:1x16x8x8,2x16x16x8,4x16x16x16")


def test_one_symbol_has_one_size(tmp_path: Path) -> None:
    model = graph("y = Concat<axis=1>(x, v)", inputs="float[N,16,8,8] x, float[N,16,8,8] v")
    shapes = "x:1x16x8x8,2x16x8x8,4x16x8x8;v:1x16x8x8,2x16x8x8,3x16x8x8"
    assert any(
        "max has the sizes [3, 4]" in f.message for f in found(model, tmp_path, "TRT035", shapes=shapes)
    )


def test_the_profile_decides_what_is_thin(tmp_path: Path) -> None:
    """A matrix-vector product at batch 1 is a real one at 64."""
    body = copied(CASES["TRT025"].failing)
    body.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert found(body, tmp_path, "TRT025")
    assert not found(body, tmp_path, "TRT025", shapes="x:1x32,64x32,64x32")


@pytest.mark.parametrize("text", ["x", "x:", "x:1,2,3,4", ":1,2,3", "x:axb,1,1", "x:1x2|x:1x2x3"])
def test_profiles_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--shapes"):
        profile_of(text)


def test_scalars_and_names_with_colons_have_profiles() -> None:
    assert profile_of("t:,,;a:b:1,2,3") == {"t": ((), (), ()), "a:b": ((1,), (2,), (3,))}


def test_a_graph_is_linted_for_the_shapes_that_build_engine_takes() -> None:
    """One shape stands for all three, and of several profiles the least and the largest count."""
    assert profile_of("sample:2x4x8x8") == {"sample": ((2, 4, 8, 8),) * 3}
    assert profile_of("x:1x8,2x8,4x8|x:2x8,6x8,9x8") == {"x": ((1, 8), (2, 8), (9, 8))}


# -- files -------------------------------------------------------------------------------------------------


def test_weights_elsewhere_are_found_and_missing_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(good(), path, save_as_external_data=True, location="weights", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = str(tmp_path / "weights")
    (tmp_path / "moved.onnx").write_bytes(model.SerializeToString())
    (finding,) = lint(tmp_path / "moved.onnx").findings
    assert (finding.rule, finding.severity) == ("TRT048", "E")
    with pytest.raises(InvalidInputError, match="has weights elsewhere"):
        lint(tmp_path / "moved.onnx", fix=tmp_path / "fixed.onnx")
    assert not (tmp_path / "fixed.onnx").exists()
    (tmp_path / "weights").unlink()
    with pytest.raises(InvalidInputError, match="weights, which is missing"):
        lint(path)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a"])
def test_files_that_are_no_graphs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(InvalidInputError, match="damaged or no ONNX graph"):
        lint(tmp_path / "graph.onnx")


def test_scales_that_are_cut_off_are_found_not_read(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(good(), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").write_bytes(b"")
    assert {"TRT036"} == {f.rule for f in lint(path).findings if f.severity == "E"}
    with pytest.raises(InvalidInputError, match="not whole"):
        lint(path, fix=tmp_path / "fixed.onnx")


def test_an_operator_without_its_inputs_is_no_graph(tmp_path: Path) -> None:
    model = good()
    del model.graph.node[-1].input[1:]
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(InvalidInputError, match="is not valid ONNX"):
        lint(tmp_path / "graph.onnx")


def test_a_cycle_is_no_graph(tmp_path: Path) -> None:
    onnx.save(graph("r = Tanh(y) y = Tanh(r)"), tmp_path / "graph.onnx")
    with pytest.raises(InvalidInputError, match="damaged"):
        lint(tmp_path / "graph.onnx")


# -- the forecast ------------------------------------------------------------------------------------------


def test_multiplications_are_counted_by_type(tmp_path: Path) -> None:
    """One convolution in int8 and one of the same size in floats: half and half, at best 4/3."""
    body = GOOD.replace("y =", "a =") + " y = Conv<pads=[1,1,1,1]>(a, Wf)"
    onnx.save(graph(body), tmp_path / "graph.onnx")
    said = forecast(Network(tmp_path / "graph.onnx"))
    assert said.total == 2 * 16 * 8 * 8 * 16 * 9
    assert said.shares == {"int8": 0.5, "fp32": 0.5}
    assert said.bound == pytest.approx(4 / 3)
    assert [(layer.share, layer.why) for layer in said.floats] == [(0.5, "not quantized")]
    assert [pair.why for pair in said.kernels] == ["it quantizes an input of the graph"]


def test_a_tensor_that_is_also_read_in_floats_needs_a_kernel(tmp_path: Path) -> None:
    body = "a = Tanh(x) " + qdq("xd", "a") + WEIGHT + CONV1 + "y = Add(y1, a)"
    onnx.save(graph(body), tmp_path / "graph.onnx")
    said = forecast(Network(tmp_path / "graph.onnx"))
    assert [pair.why for pair in said.kernels] == ["its tensor is also read in floats by Add"]
    fused = "a = Tanh(x) " + qdq("xd", "a") + WEIGHT + CONV
    onnx.save(graph(fused), tmp_path / "graph.onnx")
    assert not forecast(Network(tmp_path / "graph.onnx")).kernels


# -- OpenVINO ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not openvino.__version__.startswith("2026.4"), reason="the rule speaks of 2026.4")
@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (BOTH + "c = Concat<axis=1>(xd, vd) w = DequantizeLinear<axis=0>(W32, sw) y = Conv(c, w)", True),
        ("c = Concat<axis=1>(x, v) " + BEHIND, True),
        (
            BOTH
            + "c = Concat<axis=1>(xd, vd) t1 = Tanh(c) w = DequantizeLinear<axis=0>(W32, sw) y = Conv(t1, w)",
            False,
        ),
        (SPLIT, False),
    ],
)
def test_openvino_gets_wrong_what_the_rule_says_and_nothing_else(
    body: str, wrong: bool, tmp_path: Path
) -> None:
    model = graph(body, **TWO)
    assert bool(found(model, tmp_path, "OV001", target="openvino")) == wrong
    (expected,) = run(tmp_path / "graph.onnx")
    generator = np.random.default_rng(5)
    feed = [generator.normal(size=(1, 16, 8, 8)).astype(np.float32) for _ in range(2)]
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    engine = openvino.Core().compile_model(tmp_path / "graph.onnx", "CPU", hints)
    error = np.abs(engine(feed)[0] - expected).max() / np.abs(expected).max()
    # Its kernels for AMX get it right; those of other processors do not.
    assert error > 0.1 if wrong and "amx_int8" not in cpu_features() else error < 1e-3
