from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qdeploy.export.macs import graph_macs, meant_int8
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import CHANNELS, MEANT, SIZE, WIDTH, GraphBuilder, denoiser_graph


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_counts_follow_from_the_shapes(tmp_path: Path) -> None:
    path = saved(denoiser_graph(quantized=True), tmp_path)
    pixels = SIZE * SIZE
    assert graph_macs(path, {"sample": [1, CHANNELS, SIZE, SIZE], "timestep": []}) == {
        "conv_in": pixels * WIDTH * CHANNELS * 9,
        "body.conv": pixels * WIDTH * WIDTH * 9,
        "body.linear": pixels * WIDTH * WIDTH,
        "conv_out": pixels * CHANNELS * WIDTH * 9,
    }


def test_counts_grow_with_the_batch(tmp_path: Path) -> None:
    path = saved(denoiser_graph(quantized=False), tmp_path)
    one = graph_macs(path, {"sample": [1, CHANNELS, SIZE, SIZE], "timestep": []})
    five = graph_macs(path, {"sample": [5, CHANNELS, SIZE, SIZE], "timestep": []})
    assert five == {name: 5 * count for name, count in one.items()}


def test_groups_strides_transposed_gemms_and_norms_without_shape_inference(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.add("Conv", ["sample", g.normal("w", 8, 2, 3, 3)], "grouped", group=4, strides=[2, 2], pads=[1] * 4)
    x = g.add(
        "GroupNormalization",
        [x, g.constant("ones", np.ones(8, np.float32)), g.constant("zeros", np.zeros(8, np.float32))],
        "norm",
        num_groups=2,
    )
    x = g.add("ConvTranspose", [x, g.normal("v", 8, 5, 2, 2)], "up", strides=[2, 2])
    flat = g.add("Flatten", [x], "flat")
    g.add("Gemm", [flat, g.normal("u", 7, 5 * 16)], "gemm", transB=1)
    g.add("Gemm", [flat, g.normal("s", 2, 3)], "turned", transA=1)
    g.add("MatMul", [x, x], "square")
    path = saved(g.model({"sample": ["batch", 8, 4, 4]}, x), tmp_path)
    assert graph_macs(path, {"sample": [2, 8, 4, 4]}) == {
        "grouped": 2 * 8 * 2 * 2 * (2 * 9),
        "up": 2 * 8 * 2 * 2 * (5 * 4),
        "gemm": 2 * 7 * 80,
        "turned": 80 * 3 * 2,
        "square": 2 * 5 * 4 * 4 * 4,
    }


def test_a_layer_is_meant_when_both_inputs_come_from_integers(tmp_path: Path) -> None:
    assert meant_int8(saved(denoiser_graph(quantized=True), tmp_path)) == MEANT
    assert meant_int8(saved(denoiser_graph(quantized=False), tmp_path)) == set()


def test_integers_are_followed_through_a_transpose(tmp_path: Path) -> None:
    g = GraphBuilder()
    weight = g.add("Transpose", [g.integer_weight(g.normal("w", 5, 4), 0)], "turned", perm=[1, 0])
    x = g.add("MatMul", [g.quantize("sample", "act"), weight], "both")
    g.add("MatMul", [x, g.integer_weight(g.normal("v", 5, 4), 0)], "weight alone")
    assert meant_int8(saved(g.model({"sample": ["batch", 4]}, x), tmp_path)) == {"both"}


def test_what_is_no_graph_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(InvalidInputError, match="no ONNX graph"):
        graph_macs(path, {})
