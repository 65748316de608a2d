"""Activations that the runtime rounds: the simulation computes what OpenVINO and ONNX Runtime compute."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.quant.dynamic import DynamicQuantizer
from qdeploy.quant.layer import QuantizedLayer, is_pointwise
from qdeploy.quant.modes import freeze
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import Format, int4b32, int4b64, int8_dynamic, int8b64
from qdeploy.system.machine import int8_sums_saturate
from tests.helpers import sqnr_db

X = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 3, 128)


def rounded_layer(inner: nn.Module, weights: Format, activations: Format | None) -> QuantizedLayer:
    layer = QuantizedLayer(inner.requires_grad_(False), weights, activations)
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, weights))
        quantizer.codes = quantizer.nearest(weight)
    return layer


def graph_of(layer: QuantizedLayer, x: Tensor, path: Path) -> Path:
    freeze(layer)
    ir.save(lower(export_program(layer, {"x": x.expand(2, *x.shape[1:])}, ("y",)), "openvino"), path)
    return path


def openvino_result(file: Path, x: Tensor, group: int) -> Tensor:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    model.reshape(list(x.shape))
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
    return torch.from_numpy(core.compile_model(model, "CPU", options)([x.numpy()])[0])


def as_openvino(simulated: Tensor, floats: Tensor) -> Tensor:
    """What OpenVINO computes: on x86 without VNNI it leaves activations in float."""
    return floats if int8_sums_saturate() else simulated


def onnxruntime_result(file: Path, x: Tensor, level: int) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("weights", [int4b32, int4b64, int8b64], ids=lambda f: f.name)
def test_both_runtimes_compute_what_is_simulated(weights: Format, tmp_path: Path) -> None:
    layer = rounded_layer(nn.Linear(128, 48), weights, int8_dynamic)
    simulated = layer(X)
    floats = nn.functional.linear(X, layer.quantized_weights()[0], layer.bias)
    assert 30 < sqnr_db(floats, simulated) < 50
    file = graph_of(layer, X, tmp_path / "layer.onnx")
    assert sqnr_db(as_openvino(simulated, floats), openvino_result(file, X, weights.block)) > 100
    assert sqnr_db(simulated, onnxruntime_result(file, X, 4)) > 100
    # and products of floats, where that is asked for
    assert sqnr_db(floats, openvino_result(file, X, 0)) > 100
    assert sqnr_db(floats, onnxruntime_result(file, X, 1)) > 100


def test_a_convolution_of_one_pixel_is_a_product_of_matrices_in_blocks(tmp_path: Path) -> None:
    inner = nn.Conv2d(128, 32, 1)
    layer = rounded_layer(inner, int4b64, int8_dynamic)
    x = X.transpose(1, 2).unflatten(2, (4, 6)).contiguous()
    simulated = layer(x)
    rounded = rounded_layer(inner, int4b64, None)
    convolved = nn.functional.conv2d(x, rounded.quantized_weights()[0], inner.bias)
    assert sqnr_db(convolved, rounded(x)) > 110
    assert 30 < sqnr_db(convolved, simulated) < 50
    file = graph_of(layer, x, tmp_path / "layer.onnx")
    assert not any(node.op_type == "Conv" for node in ir.load(file).graph)
    assert sqnr_db(as_openvino(simulated, convolved), openvino_result(file, x, 64)) > 100
    assert sqnr_db(simulated, onnxruntime_result(file, x, 4)) > 100


@pytest.mark.parametrize(
    ("inner", "pointwise"),
    [
        (nn.Conv2d(8, 8, 1), True),
        (nn.Conv2d(8, 8, 3), False),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(8, 8, 1, padding=1), False),
        (nn.Conv2d(8, 8, 1, groups=2), False),
        (nn.Linear(8, 8), False),
    ],
)
def test_only_plain_convolutions_of_one_pixel_are_products(inner: nn.Module, pointwise: bool) -> None:
    assert is_pointwise(inner) is pointwise


def test_each_group_of_features_of_each_token_has_a_scale_of_its_own() -> None:
    x = torch.ones(1, 2, 8)
    x[0, 0, :4] *= 1000  # spoils nothing but its own group
    x[0, 1, 4:] = 0  # has no scale at all
    assert torch.equal(DynamicQuantizer(int8_dynamic, 4)(x), x)
    noisy = torch.randn(3, 5, 64)
    rounded = DynamicQuantizer(int8_dynamic, 16)(noisy).unflatten(-1, (4, 16))
    steps = noisy.unflatten(-1, (4, 16)).abs().amax(-1, keepdim=True) / 127
    assert ((rounded - noisy.unflatten(-1, (4, 16))).abs() <= steps / 2 * (1 + 1e-5)).all()


def test_gradients_pass_through_the_rounding() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    DynamicQuantizer(int8_dynamic, 32)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones_like(x))
