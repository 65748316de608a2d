"""Engines by the real builder of TensorRT for RTX, which needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy.engines.tensorrt.builder import build
from qdeploy.engines.tensorrt.flavour import RTX

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx, which the extra dev installs")


def built(graph: Path, folder: Path, gpu: str = "sm89", **options: Any) -> dict[str, Any]:
    """The plan.json and layers.json of an engine, as one dictionary."""
    build(graph, folder, **{"flavour": RTX, "precision": "f16", "gpu": gpu, **options})
    return {
        "plan": json.loads((folder / "plan.json").read_text()),
        **json.loads((folder / "layers.json").read_text()),
    }


def save_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any],
    sample: Sequence[int | str],
    output: Sequence[int | str],
    opset: int = 21,
) -> Path:
    """A graph from ``sample`` and ``timestep`` to ``out_sample``."""
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, sample),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, output)],
        [
            value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def quantized_conv(path: Path, kind: int = TensorProto.INT8, computed_scale: bool = False) -> Path:
    """One convolution with a Q/DQ pair at its input and a DQ with a scale per channel at its weight."""
    codes = np.random.default_rng(0).integers(-100, 100, (32, 32, 3, 3))
    zero = helper.make_tensor("zero", kind, [], [0])
    constants = {
        "zero": zero,
        "zeros": helper.make_tensor("zeros", kind, [32], [0] * 32),
        "weight": helper.make_tensor("weight", kind, codes.shape, codes.flatten().tolist()),
        "scales": np.linspace(0.01, 0.02, 32, dtype=np.float32),
        "scale": np.float32(0.05),
    }
    scale = "t" if computed_scale else "scale"
    nodes = [
        helper.make_node("Mul", ["timestep", "scale"], ["t"], name="scale_by_t"),
        helper.make_node("QuantizeLinear", ["sample", scale, "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", scale, "zero"], ["x"], name="dq"),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], name="w_dq", axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["y", "t"], ["out_sample"], name="by_t"),
    ]
    return save_graph(path, nodes, constants, ["batch", 32, 8, 8], ["batch", 32, 8, 8])


def int4_linear(path: Path, block: int = 64) -> Path:
    """One linear layer with int4 weights in blocks, and nothing else quantized."""
    codes = np.random.default_rng(0).integers(-8, 8, (128, 64))
    constants = {
        "weight": helper.make_tensor("weight", TensorProto.INT4, codes.shape, codes.flatten().tolist()),
        "scales": np.full((128 // block, 64), 0.01, np.float32),
    }
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["weight", "scales"], ["w"], name="w_dq", axis=0, block_size=block
        ),
        helper.make_node("MatMul", ["sample", "w"], ["y"], name="linear"),
        helper.make_node("Mul", ["y", "timestep"], ["out_sample"], name="by_t"),
    ]
    return save_graph(path, nodes, constants, ["batch", 16, 128], ["batch", 16, 64])


def normed_conv(path: Path) -> Path:
    """A group norm, as in front of attention, and a quantized convolution of one pixel behind it."""
    codes = np.random.default_rng(0).integers(-100, 100, (64, 64, 1, 1))
    constants = {
        "gain": np.linspace(0.5, 1, 64, dtype=np.float32),
        "bias": np.linspace(-1, 1, 64, dtype=np.float32),
        "zero": helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        "weight": helper.make_tensor("weight", TensorProto.INT8, codes.shape, codes.flatten().tolist()),
        "weight_scale": np.float32(0.01),
        "scale": np.float32(0.02),
    }
    nodes = [
        helper.make_node("Mul", ["sample", "timestep"], ["x"], name="by_t"),
        helper.make_node(
            "GroupNormalization", ["x", "gain", "bias"], ["n"], name="norm", num_groups=16, epsilon=1e-6
        ),
        helper.make_node("QuantizeLinear", ["n", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dq"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["w"], name="w_dq"),
        helper.make_node("Conv", ["d", "w"], ["y"], name="conv"),
        helper.make_node("Add", ["y", "x"], ["out_sample"], name="skip"),
    ]
    return save_graph(path, nodes, constants, [2, 64, 16, 16], [2, 64, 16, 16])
