"""TensorRT for RTX for real: what its builder takes, what the plan says, and how it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto

from qdeploy.engines.tensorrt.flavour import RTX, TENSORRT
from qdeploy.engines.tensorrt.inspector import dtype
from qdeploy.engines.tensorrt.plan import check_origin, read_sidecar
from qdeploy.engines.tensorrt.validity import check_validity
from qdeploy.engines.tensorrt.verify import verify
from qdeploy.engines.tensorrt_rtx import build
from qdeploy.export.lint.run import lint
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from tests.engines.tensorrt.bench import ADA
from tests.engines.tensorrt.real_builds import (
    built,
    int4_linear,
    normed_conv,
    quantized_conv,
)

KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_convolution_is_low_bit_in_the_plan(kind: str, tmp_path: Path) -> None:
    found = built(quantized_conv(tmp_path / "model.onnx", KINDS[kind]), tmp_path / "engine", "sm89,sm120")
    assert found["source"] == "build log"
    assert found["plan"]["targets"] == [89, 120]
    report = found["report"]
    assert (report["planned"], report["as_planned"], report["kinds"]) == (1, 1, {kind: 1})
    assert report["in_float"] == {}
    assert report["not_found"] == []


@pytest.mark.parametrize("block", [32, 64, 128])
def test_int4_weights_in_blocks_are_read_in_four_bits(block: int, tmp_path: Path) -> None:
    """A block as long as the inputs too, which the builder would dequantize in every call."""
    graph = int4_linear(tmp_path / "model.onnx", block)
    found = built(graph, tmp_path / "engine", shapes="sample:2x16x128")
    assert found["report"]["kinds"] == {"int4": 1}
    assert found["moved"]["weights"]["int4"] == 128 * 64 // 2
    plain = built(graph, tmp_path / "plain", shapes="sample:2x16x128", flavour=replace(RTX, rewrites=False))
    assert plain["report"]["kinds"] == ({} if block == 128 else {"int4": 1})
    assert plain["moved"]["total"] - found["moved"]["total"] == (32648 if block == 128 else 0)


def test_lint_and_the_builder_agree_on_a_crash(tmp_path: Path) -> None:
    graph = quantized_conv(tmp_path / "model.onnx", computed_scale=True)
    assert "TRT005" in {
        finding.rule for finding in lint(graph, engine="tensorrt-rtx").findings if finding.severity == "E"
    }
    found = verify(graph)
    assert not found.built
    assert "crashed by SIGSEGV" in found.lines()[0]
    assert found.lines()[0].startswith("RUN tensorrt-rtx 1.")


def test_lint_calls_an_error_what_the_builder_reads_as_another_type(tmp_path: Path) -> None:
    """UINT8 codes with zero point 0, which the builder takes for INT8: those above 127 are clipped."""
    import onnx

    graph = quantized_conv(tmp_path / "model.onnx")
    model = onnx.load(graph)
    (zero,) = (tensor for tensor in model.graph.initializer if tensor.name == "zero")
    zero.data_type = TensorProto.UINT8
    onnx.save(model, graph)
    assert {f.rule for f in lint(graph, engine="tensorrt-rtx").findings if f.severity == "E"} == {"TRT002"}
    found = verify(graph)
    assert found.built
    assert found.products == ("int8 -> f32",)


def test_verify_says_what_ran_in_low_bits(tmp_path: Path) -> None:
    (first, *rest) = verify(quantized_conv(tmp_path / "model.onnx")).lines()
    assert "1 of 1 quantized products run in their type" in first
    assert rest == ["RUN 1 low-bit products write float32, first conv"]


def test_with_a_scale_for_each_channel_it_would_write_float32_and_the_report_would_say_so(
    tmp_path: Path,
) -> None:
    graph = quantized_conv(tmp_path / "model.onnx")
    shapes = "sample:2x32x8x8"
    plain = replace(RTX, rewrites=False)
    before = built(graph, tmp_path / "before", shapes=shapes, flavour=plain)
    assert set(before["report"]["float32_results"]) == {"conv"}
    assert "output channel" in before["report"]["float32_results"]["conv"]
    after = built(graph, tmp_path / "after", shapes=shapes)
    assert after["report"]["float32_results"] == {}
    assert after["moved"]["total"] < before["moved"]["total"]


def test_a_norm_in_front_of_attention_is_rounded_in_its_kernel(tmp_path: Path) -> None:
    """No tensor of 16 bits is written for a kernel that does nothing but round."""
    graph = normed_conv(tmp_path / "model.onnx")
    before = built(graph, tmp_path / "before", flavour=replace(RTX, rewrites=False))
    after = built(graph, tmp_path / "after")
    moved = [found["moved"]["activations"]["f16"] for found in (before, after)]
    assert moved[0] - moved[1] == 2 * 2 * (2 * 64 * 16 * 16)  # written and read, two bytes each
    assert len(after["layers"]) == len(before["layers"]) - 1


def test_in_bf16_the_norm_keeps_its_form_because_the_shift_would_cost_a_step(tmp_path: Path) -> None:
    graph = normed_conv(tmp_path / "model.onnx")
    layers = {
        precision: [
            layer["Name"] for layer in built(graph, tmp_path / precision, precision=precision)["layers"]
        ]
        for precision in ("f16", "bf16")
    }
    assert any("Relu" in name for name in layers["f16"])
    assert not any("Relu" in name for name in layers["bf16"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_with_float32_scales_writes_16_bits(kind: str, tmp_path: Path) -> None:
    graph = quantized_conv(tmp_path / "model.onnx", KINDS[kind])
    layers = built(graph, tmp_path / "engine", shapes="sample:2x32x8x8")["layers"]
    (rounding,) = [layer for layer in layers if dtype(layer["Outputs"][0]) == kind]
    assert [dtype(constant) for constant in rounding["Constants"]] == ["f32"]  # the step of the quantizer
    (conv,) = [layer for layer in layers if layer["LayerType"] == "correlation"]
    assert [dtype(output) for output in conv["Outputs"]] == ["f16"]


def test_bytes_moved_are_exact_for_one_shape_and_flagged_for_several(tmp_path: Path) -> None:
    graph = quantized_conv(tmp_path / "model.onnx")
    one = built(graph, tmp_path / "one", shapes="sample:2x32x8x8")["moved"]
    assert one["exact"]
    elements = 2 * 32 * 8 * 8
    assert one["activations"]["int8"] == 2 * elements  # written by the quantizing kernel, read by the product
    assert one["weights"]["int8"] == 32 * 32 * 9
    assert not built(graph, tmp_path / "several")["moved"]["exact"]


def test_two_builds_for_one_shape_are_equal_byte_by_byte(tmp_path: Path) -> None:
    graph = quantized_conv(tmp_path / "model.onnx")
    for name in ("one", "two"):
        built(graph, tmp_path / name, shapes="sample:2x32x8x8")
    for file in ("model.plan", "plan.json", "layers.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_peak_of_memory_is_that_of_the_builder_alone(tmp_path: Path) -> None:
    held = b"x" * 800_000_000  # of this process, which starts the builder's
    took = build(quantized_conv(tmp_path / "model.onnx"), tmp_path / "engine", gpu="sm89")
    assert 100_000_000 < took["peak_bytes"] < len(held)


def test_a_crash_of_the_builder_is_a_sentence_with_the_last_node(tmp_path: Path) -> None:
    graph = quantized_conv(tmp_path / "model.onnx", computed_scale=True)
    with pytest.raises(InvalidInputError, match=r"crashed by SIGSEGV .* the node out_sample/cast") as caught:
        build(graph, tmp_path / "engine", precision="f16", gpu="sm89")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "engine" / "model.plan").exists()


@pytest.mark.parametrize(
    ("limit", "words"),
    [({"time_limit": 1e-3}, "after 0.001 minutes"), ({"memory_limit": 1e-3}, "--memory-limit 0.001")],
)
def test_limits_end_the_builder_with_a_sentence(limit: dict[str, float], words: str, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=words) as caught:
        build(quantized_conv(tmp_path / "model.onnx"), tmp_path / "engine", gpu="sm89", **limit)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "engine" / "model.plan").exists()


@pytest.mark.parametrize(
    ("kind", "gpu", "words"),
    [
        ("fp8", "sm86", "fp8 needs sm89 or newer"),
        ("int8", "sm75,sm89", "the other GPUs lose theirs"),
        ("int8", "h100", "does not compile for h100"),
        ("int8", "rtx9999", "does not know 'rtx9999'"),
    ],
)
def test_gpus_without_the_kernels_are_refused_before_any_build(
    kind: str, gpu: str, words: str, tmp_path: Path
) -> None:
    graph = quantized_conv(tmp_path / "model.onnx", KINDS[kind])
    with pytest.raises((CapabilityError, UsageError), match=words):
        build(graph, tmp_path / "engine", gpu=gpu)
    assert not (tmp_path / "engine").exists()


def test_what_the_parser_refuses_is_told_with_the_node(tmp_path: Path) -> None:
    import onnx

    graph = quantized_conv(tmp_path / "model.onnx")
    model = onnx.load(graph)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Mystery", "custom"
    model.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    onnx.save(model, graph)
    with pytest.raises(InvalidInputError, match=r"node \d+ 'by_t' \(Mystery\)"):
        build(graph, tmp_path / "engine", gpu="sm89")


def test_the_plan_is_refused_where_it_was_not_built_for(tmp_path: Path) -> None:
    sidecar = built(quantized_conv(tmp_path / "model.onnx"), tmp_path / "engine", "sm120")["plan"]
    version = tuple(int(part) for part in sidecar["tensorrt"].split("."))
    with pytest.raises(CapabilityError, match="built for sm120, the Fake Ada is sm89"):
        check_origin(sidecar, version, ADA, RTX)
    with pytest.raises(CapabilityError, match="built by tensorrt-rtx, which TensorRT cannot load"):
        check_origin(sidecar, version, ADA, TENSORRT)
    here = sidecar | {"targets": [89]}
    check_origin(here, version, ADA, RTX)
    with pytest.raises(CapabilityError, match="build the engine again"):
        check_origin(here, (1, 6, 1, 120), ADA, RTX)
    plan = tmp_path / "engine" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match="bytes: copy or build it again"):
        read_sidecar(tmp_path / "engine")


def test_the_library_itself_tells_a_foreign_plan_from_a_missing_driver() -> None:
    import tensorrt_rtx as trt

    from qdeploy.engines.tensorrt.logger import create, logger_of

    runtime = create(trt.Runtime, logger_of(trt), logger=logger_of(trt))
    with pytest.raises(InvalidInputError, match="is damaged or no plan"):
        check_validity(trt, runtime, b"no plan at all" * 100, Path("x.plan"))
