"""Shifted inputs: exact in float, borders included, and all codes of a symmetric format in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.centering import CenterInputs, can_shift, middle
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.recipe.formats import int8
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, calibrating, plain_options, sqnr_db, tiny_unet

INNER = {
    "linear": (lambda: nn.Linear(12, 9), (4, 7, 12)),
    "convolution": (lambda: nn.Conv2d(12, 9, 3, padding=1), (2, 12, 6, 6)),
    "strided": (lambda: nn.Conv2d(12, 9, 3, stride=2, padding=(2, 1), dilation=(2, 1)), (2, 12, 9, 6)),
    "without a bias": (lambda: nn.Conv2d(12, 9, 1, bias=False), (2, 12, 6, 6)),
}


def shifted_layer(kind: str, split: tuple[int, ...] = ()) -> tuple[QuantizedLayer, Tensor]:
    """A layer behind SiLU, its input shifted."""
    make, shape = INNER[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner, x = make().requires_grad_(False), nn.functional.silu(2 * torch.randn(shape))
    layer = QuantizedLayer(inner, int8, int8, split)
    layer.shift = torch.full((12,), float(x.min() + x.max()) / 2)
    return layer, x


def calibrate_layer(layer: QuantizedLayer, x: Tensor) -> None:
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, int8))
        quantizer.codes = quantizer.nearest(weight)
    for quantizer, part in zip(layer.activation_quantizers, layer.input_parts(x), strict=True):
        quantizer.set(*to_scale(part.min(), part.max(), int8))


@pytest.mark.parametrize("kind", INNER)
def test_without_quantization_the_layer_computes_what_it_did(kind: str) -> None:
    layer, x = shifted_layer(kind)
    layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
    assert sqnr_db(layer.inner(x), layer(x)) > 100


@pytest.mark.parametrize("kind", INNER)
def test_codes_that_were_unused_make_the_steps_smaller(kind: str) -> None:
    layer, x = shifted_layer(kind)
    calibrate_layer(layer, x)
    plain, _ = shifted_layer(kind)
    plain.shift = None
    calibrate_layer(plain, x)
    assert layer.activation_quantizers[0].scale < 0.62 * plain.activation_quantizers[0].scale
    exact = layer.inner(x)
    assert sqnr_db(exact, layer(x)) > sqnr_db(exact, plain(x)) + 1.5


@pytest.mark.slow
@pytest.mark.parametrize("split", [(), (8, 4)])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_graph_holds_the_shift_in_its_bias(kind: str, split: tuple[int, ...], tmp_path: Path) -> None:
    import onnxruntime

    layer, x = shifted_layer(kind, split)
    calibrate_layer(layer, x)
    simulated = layer(x)
    freeze(layer)
    assert sqnr_db(simulated, layer(x)) > 100
    graph = lower(export_program(layer, {"x": x}, ("y",)), "portable")
    assert not {"ReduceSum", "Gather"} & {node.op_type for node in graph.graph}
    save(graph, tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", plain_options())
    assert sqnr_db(simulated, torch.from_numpy(session.run(None, {"x": x.numpy()})[0])) > 100


def test_a_network_is_shifted_where_its_ranges_are_lopsided_and_stays_exact(tmp_path: Path) -> None:
    denoiser, data = tiny_unet((16, 32)), MemoryRows.noisy()
    expected = denoise(denoiser, data.inputs(range(6)))
    with calibrating(denoiser, data, tmp_path / "x", weights="int8", activations="int8") as session:
        CenterInputs().run(session)
        layers = quantized_layers(denoiser)
        assert 0 < sum(layer.shift is not None for layer in layers.values()) < len(layers)
        WeightRanges().run(session)
        ActivationRanges().run(session)
        assert 25 < sqnr_db(expected, denoise(denoiser, data.inputs(range(6)))) < 70
        for layer in layers.values():
            layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
        assert sqnr_db(expected, denoise(denoiser, data.inputs(range(6)))) > 100


def test_ranges_that_are_even_stay_where_they_are() -> None:
    assert middle(torch.tensor([-1.0, -2.0]), torch.tensor([1.5, 2.1]), channels=False) is None
    found = middle(torch.tensor([-0.2, 0.0]), torch.tensor([4.0, 1.0]), channels=False)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([1.9, 1.9]))
    own = middle(torch.tensor([-0.2, 0.0]), torch.tensor([4.0, 1.0]), channels=True)
    assert own is not None
    torch.testing.assert_close(own, torch.tensor([1.9, 0.5]))


@pytest.mark.parametrize(
    ("inner", "able"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), True),
        (nn.Conv2d(4, 4, 3, padding="same"), False),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
    ],
)
def test_other_borders_than_zeros_are_left_alone(inner: nn.Module, able: bool) -> None:
    assert can_shift(QuantizedLayer(inner, int8, int8)) is able
    assert not can_shift(QuantizedLayer(inner, int8, None))


def test_formats_with_a_zero_point_need_no_shift(tmp_path: Path) -> None:
    recipe = {"weights": "int8", "activations": "uint8", "target": "openvino"}
    with (
        calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "x", **recipe) as session,
        pytest.raises(UsageError, match="symmetric activations, and they are uint8"),
    ):
        CenterInputs().run(session)
