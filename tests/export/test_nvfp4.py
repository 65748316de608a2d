"""NVFP4 from calibration to a graph: the same numbers by onnx's own evaluator, four bits, clean for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from qdeploy.calibrate.methods import gptq, minmax
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.half import halve
from qdeploy.export.graph import save
from qdeploy.export.lint.run import lint
from qdeploy.export.lower import lower
from qdeploy.export.products import products
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.quant.operators import round_float
from qdeploy.quant.state import code_shapes, read_state, write_state
from qdeploy.recipe.formats import nvfp4
from tests.helpers import MemoryRows, calibrating, dit_rows, sqnr_db
from tests.models import tiny_dit

DATA = dit_rows(MemoryRows.noisy())
ROWS = [0, 21, 42]
RECIPE: dict[str, Any] = {
    "weights": "nvfp4",
    "activations": "nvfp4",
    "target": "tensorrt",
}


class TRT_FP4DynamicQuantize(OpRun):
    """The operator as TensorRT documents it, in numpy; onnx finds it by its name."""

    op_domain = "trt"

    def _run(self, x: Any, scale: Any, axis: int, block_size: int, scale_type: int) -> tuple[Any, Any]:
        assert (axis, block_size, scale_type) == (-1, 16, onnx.TensorProto.FLOAT8E4M3FN)
        blocks = x.reshape(*x.shape[:-1], -1, block_size)
        wanted = np.abs(blocks).max(-1) / np.float32(6) / scale
        scales = np.minimum(wanted, 448).astype(ml_dtypes.float8_e4m3fn)
        steps = (scales.astype(np.float32) * scale)[..., None]
        codes = np.clip(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0), -6, 6)
        return codes.reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


class Case:
    """A small transformer in NVFP4: simulated, its state, and its graph for TensorRT."""

    def __init__(self, folder: Path) -> None:
        self.denoiser, self.path = tiny_dit(), folder / "model.onnx"
        with calibrating(self.denoiser, DATA, folder / "checkpoint", **RECIPE) as session:
            minmax.WeightRanges(finder="lp").run(session)
            minmax.ActivationRanges().run(session)
            for layer in quantized_layers(self.denoiser).values():
                minmax.round_to_nearest(layer)
        self.state, self.shapes = read_state(self.denoiser), code_shapes(self.denoiser)
        self.layers = list(quantized_layers(self.denoiser))
        with torch.no_grad():
            self.simulated = denoise(self.denoiser, self.inputs())
            self.reference = denoise(tiny_dit(), self.inputs())
        freeze(self.denoiser)
        model = lower(trace(self.denoiser, DATA.inputs([0, 1])), "tensorrt")
        model.producer_name = "qdeploy"
        save(model, self.path)

    def inputs(self) -> dict[str, Tensor]:
        return {**DATA.inputs(ROWS), "timestep": torch.full((len(ROWS),), 500.0)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("nvfp4"))


def test_the_graph_computes_what_torch_simulated(case: Case) -> None:
    model = ReferenceEvaluator(str(case.path), new_ops=[TRT_FP4DynamicQuantize])
    feeds = {name: x.numpy() for name, x in case.inputs().items()} | {"timestep": np.array(500, np.float32)}
    (computed,) = model.run([OUTPUT], feeds)
    assert sqnr_db(case.simulated, torch.from_numpy(computed)) > 45  # a rounding may fall to the other side
    assert 15 < sqnr_db(case.reference, case.simulated) < 45  # it is quantized, and not lost


def test_every_layer_is_a_product_of_float4_and_the_graph_is_clean(case: Case) -> None:
    kinds = {product.name: product.kind for product in products(case.path) if product.kind}
    assert kinds == dict.fromkeys(case.layers, "fp4")
    report = lint(case.path, tensorrt="11.4")
    assert [(f.rule, f.message) for f in report.findings if f.severity in "EW" and f.waived is None] == []
    assert report.macs["shares"]["fp4"] > 0.9
    assert read_graph(case.path).low_bit == {"fp4"}
    older = lint(case.path, tensorrt="11.4", compute_capability="8.9")
    assert {f.rule for f in older.findings if f.severity == "E"} == {"TRT042"}


def test_weights_take_four_bits_and_q_k_and_v_read_one_rounded_tensor(case: Case) -> None:
    model = ir.load(case.path)
    assert model.opset_imports[""] == 23
    codes = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT4E2M1]
    assert len(codes) == len(case.layers)
    rounded = [node for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize"]
    assert len(rounded) == len(case.layers) - 2 * 2  # two blocks, whose k and v read what q reads
    dequantized = [
        node for node in model.graph if node.inputs and node.inputs[0] in {n.outputs[0] for n in rounded}
    ]
    assert len(dequantized) == len(rounded)


def test_scales_are_the_same_numbers_in_half_precision(case: Case, tmp_path: Path) -> None:
    """So that the engine multiplies what was simulated."""
    halve(case.path, tmp_path / "model.onnx", "f16")
    single, half = (onnx.load(path) for path in (case.path, tmp_path / "model.onnx"))

    def scales(model: onnx.ModelProto) -> list[float]:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        rounded = [node for node in model.graph.node if node.op_type == "TRT_FP4DynamicQuantize"]
        return [float(onnx.numpy_helper.to_array(constants[node.input[1]])) for node in rounded]

    assert scales(half) == scales(single)
    onnx.checker.check_model(half)


def test_state_is_written_and_read_without_loss(case: Case, tmp_path: Path) -> None:
    fresh = tiny_dit()
    with calibrating(fresh, DATA, tmp_path / "again", **RECIPE):
        write_state(fresh, case.state, case.shapes)
    with torch.no_grad():
        assert torch.equal(denoise(fresh, case.inputs()), case.simulated)


def test_roundings_in_closed_form_are_numbers_of_the_grid(tmp_path: Path) -> None:
    network = tiny_dit()
    with calibrating(network, DATA, tmp_path / "x", **RECIPE) as session:
        minmax.WeightRanges(finder="minmax").run(session)
        gptq.GPTQ().run(session)
    decided = 0
    for layer in quantized_layers(network).values():
        for quantizer, weight in layer.weight_pairs():
            assert quantizer.codes is not None
            codes = quantizer.codes.float()
            assert torch.equal(round_float(codes, nvfp4), codes)
            decided += int((codes != quantizer.nearest(weight).float()).sum())
    assert decided > 0
