"""ONNX bundles made by hand: a few layers of a denoiser, float or with Q/DQ, and their probe.

The expected outputs come from onnx's reference evaluator, which shares no code with any engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import InPlacePass
from onnx_ir.passes import Sequential as Passes
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qdeploy.store.artifact import Artifact, Bundle
from qdeploy.store.builder import Draft
from qdeploy.store.facts import BundleFacts
from qdeploy.store.manifest import Notes

CHANNELS, WIDTH, SIZE = 3, 16, 6
SCALE = 0.03
CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": SIZE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": [WIDTH],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
MEANT = {"body.conv", "body.linear"}


class GraphBuilder:
    """Collects nodes and initializers."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node whose output bears its name."""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def constant(self, name: str, value: Any) -> str:
        self.initializers[name] = np.asarray(value)
        return name

    def normal(self, name: str, *shape: int) -> str:
        scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        return self.constant(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def quantize(self, x: str, name: str) -> str:
        """Q/DQ with a constant symmetric scale."""
        scale = self.constant(f"{name}.scale", np.float32(SCALE))
        zero = self.constant(f"{name}.zero", np.int8(0))
        return self.add(
            "DequantizeLinear",
            [self.add("QuantizeLinear", [x, scale, zero], f"{name}/q"), scale, zero],
            f"{name}/dq",
        )

    def integer_weight(self, weight: str, axis: int, limit: int = 63) -> str:
        """An initializer as int8 codes per channel behind DequantizeLinear.

        Up to 63, codes run as int8 on every processor.
        """
        value = self.initializers.pop(weight)
        others = tuple(i for i in range(value.ndim) if i != axis)
        scale = (np.abs(value).max(others) / limit).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        codes = np.rint(value / scale.reshape(shape)).astype(np.int8)
        names = [
            self.constant(f"{weight}.codes", codes),
            self.constant(f"{weight}.scale", scale),
            self.constant(f"{weight}.zero", np.zeros(len(scale), np.int8)),
        ]
        return self.add("DequantizeLinear", names, f"{weight}/dq", axis=axis)

    def model(self, inputs: Mapping[str, Sequence[str | int]], output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["out_sample"], name="out")],
            "denoiser",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, shape) for k, shape in inputs.items()],
            [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", None, None, None])],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("custom", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def denoiser_graph(
    quantized: bool, concat: bool = False, unknown: bool = False, limit: int = 63
) -> onnx.ModelProto:
    """conv_in, a convolution and a linear layer that may be quantized, the timestep added, conv_out.

    Args:
        quantized: Q/DQ around the two layers in the middle.
        concat: let the first of them read a Concat that nothing else reads.
        unknown: put an operation in that no runtime knows.
        limit: the largest code of weights.
    """
    g = GraphBuilder()
    x = g.add("Conv", ["sample", g.normal("w_in", WIDTH, CHANNELS, 3, 3)], "conv_in", pads=[1, 1, 1, 1])
    if concat:
        x = g.add("Concat", [x, g.add("Neg", [x], "neg")], "cat", axis=1)
    if unknown:
        x = g.add("Mystery", [x], "body.mystery", domain="custom")
    weight = g.normal("w_conv", WIDTH, WIDTH * (2 if concat else 1), 3, 3)
    bias = g.normal("b_conv", WIDTH)
    if quantized:
        x, weight = g.quantize(x, "act_conv"), g.integer_weight(weight, 0, limit)
    x = g.add("Conv", [x, weight, bias], "body.conv", pads=[1, 1, 1, 1])
    rate = g.constant("rate", np.float32(0.001))
    x = g.add("Add", [x, g.add("Mul", ["timestep", rate], "embedding")], "timed")
    x = g.add("Transpose", [x], "to_last", perm=[0, 2, 3, 1])
    weight = g.normal("w_linear", WIDTH, WIDTH)
    if quantized:
        x, weight = g.quantize(x, "act_linear"), g.integer_weight(weight, 1, limit)
    x = g.add("Add", [g.add("MatMul", [x, weight], "body.linear"), g.normal("b_linear", WIDTH)], "biased")
    x = g.add("Transpose", [x], "to_first", perm=[0, 3, 1, 2])
    x = g.add("Conv", [x, g.normal("w_out", CHANNELS, WIDTH, 3, 3)], "conv_out", pads=[1, 1, 1, 1])
    return g.model({"sample": ["batch", CHANNELS, SIZE, SIZE], "timestep": []}, x)


def example_inputs(rows: int = 4) -> dict[str, torch.Tensor]:
    """Inputs with timesteps that repeat, out of order, and are fractional."""
    random = torch.Generator().manual_seed(0)
    t = torch.tensor([7.5, 3.0, 7.5, 900.0, 3.0])
    return {
        "sample": torch.randn(rows, CHANNELS, SIZE, SIZE, generator=random),
        "timestep": t[torch.arange(rows) % len(t)],
    }


def expected(graph: onnx.ModelProto, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the graph computes, by onnx's reference evaluator, row by row."""
    evaluator = ReferenceEvaluator(graph)
    rows = [
        evaluator.run(None, {"sample": x[None].numpy(), "timestep": t.numpy()})[0]
        for x, t in zip(inputs["sample"], inputs["timestep"], strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def write_bundle(
    folder: Path,
    *,
    quantized: bool = True,
    concat: bool = False,
    unknown: bool = False,
    facts: Mapping[str, Any] | None = None,
    simulated: torch.Tensor | None = None,
    limit: int = 63,
    passes: Sequence[type[InPlacePass]] = (),
) -> Artifact:
    """An ``onnx`` artifact around `denoiser_graph`.

    Args:
        folder: where it goes.
        quantized: passed on.
        concat: passed on.
        unknown: passed on; the probe is then that of the graph without it.
        facts: added to the manifest's facts.
        limit: passed on.
        passes: rewrites of the graph, which may not change what it computes.
        simulated: what the probe claims the fake-quantized model to give; the truth by default.
    """
    graph = denoiser_graph(quantized, concat, unknown, limit)
    inputs = example_inputs()
    probe = {f"input.{name}": x for name, x in inputs.items()}
    probe["reference"] = expected(denoiser_graph(False, concat), inputs)
    if quantized:
        truth = expected(denoiser_graph(True, concat, limit=limit), inputs)
        probe["simulated"] = truth if simulated is None else simulated
    described = {
        "component": "unet",
        "class_name": "UNet2DModel",
        "model_sha256": "0" * 64,
        "precision": "W8A8" if quantized else "fp32",
        "weights": "int8" if quantized else "none",
        "activations": "int8" if quantized else "none",
        "simulated": [],
        "target": "portable",
    }
    with Draft(folder, Bundle, {"model": "0" * 64}, options={"test": str(folder)}) as draft:
        (draft.content / "unet").mkdir()
        if passes:
            model = ir.from_proto(onnx.shape_inference.infer_shapes(graph))
            graph = ir.to_proto(
                Passes(*(rewrite() for rewrite in passes), RemoveUnusedNodesPass())(model).model
            )
        onnx.save(graph, draft.content / "unet" / "model.onnx")
        draft.json("unet/config.json", CONFIG)
        draft.tensors("probe.safetensors", lambda: probe)
        return draft.finish(
            BundleFacts(**{**described, **(facts or {})}), notes=Notes(source="/nowhere/model")
        )
