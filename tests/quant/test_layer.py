"""Quantized layers: switched off they are the layer itself, switched on they are what is exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import round_to_nearest
from qdeploy.quant.layer import QuantizedLayer, quantized_layers, replace_module
from qdeploy.quant.modes import freeze, full_precision, weights_only
from qdeploy.quant.operators import dequantize_codes
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.ranges import lp_weights, minmax_weights
from qdeploy.recipe.formats import (
    Format,
    fp8,
    int4,
    int4b64,
    int4b128,
    int6,
    int8,
    integer,
    uint4,
    uint6,
    uint8,
)
from tests.helpers import minmax_layer, relative

LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1, stride=2), (4, 6, 7, 7)),
    "reflecting conv": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (4, 6, 7, 7)),
    "grouped conv": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (4, 6, 7, 7)),
    "conv 1d": (lambda: nn.Conv1d(6, 5, 1), (4, 6, 9)),
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False), torch.randn(shape)


def test_switched_off_a_layer_is_bit_identical(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    inner, x = layer_and_input
    layer = minmax_layer(inner, x, int4, int4)
    assert not torch.equal(layer(x), inner(x))
    with full_precision(layer):
        assert torch.equal(layer(x), inner(x))
    assert not torch.equal(layer(x), inner(x))


def test_sixteen_bits_change_next_to_nothing(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    inner, x = layer_and_input
    layer = minmax_layer(inner, x, integer(16), integer(16))
    assert relative(inner(x), layer(x)) < 1e-3


def test_without_formats_a_layer_computes_as_before(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    inner, x = layer_and_input
    assert torch.equal(QuantizedLayer(inner, None, None)(x), inner(x))


def test_quantization_is_that_of_weight_and_input_alone(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    """The bias stays in float, and the arithmetic between is the layer's own."""
    inner, x = layer_and_input
    layer = minmax_layer(inner, x, int8, int8)
    plain: Any = type(inner).__new__(type(inner))
    # A layer of the same kind, with the quantized numbers put in by hand.
    plain.__dict__ = {**inner.__dict__, "_parameters": dict(inner._parameters)}
    plain._parameters["weight"] = nn.Parameter(layer.quantized_weights()[0], requires_grad=False)
    assert torch.equal(layer(x), plain(layer.input_quantizers[0](x)))


def test_weights_only_leaves_inputs_in_float(layer_and_input: tuple[nn.Module, Tensor]) -> None:
    inner, seen = layer_and_input
    layer, alone = minmax_layer(inner, seen, int8, int8), minmax_layer(inner, seen, int8, None)
    with weights_only(layer):
        assert torch.equal(layer(seen), alone(seen))
    assert not torch.equal(layer(seen), alone(seen))


def test_switches_are_set_back_after_an_error() -> None:
    layer = minmax_layer(nn.Linear(3, 2), torch.randn(4, 3), int8, int8)
    for context in (full_precision, weights_only):
        with pytest.raises(ZeroDivisionError), context(layer):
            _ = 1 / 0
    assert layer.quantized
    assert all(quantizer.enabled for quantizer in layer.input_quantizers)


def test_a_module_is_replaced_within_lists_and_at_the_top() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    for path in ("0", "1.0"):
        replace_module(network, path, QuantizedLayer(network.get_submodule(path), int8, None))
    assert list(quantized_layers(network)) == ["0", "1.0"]


# -- codes -------------------------------------------------------------------------------------------------


def random_weight(number_format: Format, seed: int = 0) -> tuple[Tensor, WeightQuantizer]:
    """A weight with channels that span zero, that are all positive, all negative, and all zero."""
    shape = (6, 128) if number_format.block else (6, 5, 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[1], weight[2], weight[3] = weight[1].abs() + 3, -weight[2].abs() - 3, 0
    quantizer = WeightQuantizer(number_format, *weight.shape[:2])
    quantizer.set(*lp_weights(weight, number_format))
    return weight, quantizer


@pytest.mark.parametrize("number_format", [uint4, int4, uint6, int6, int8], ids=lambda f: f.name)
@pytest.mark.parametrize("seed", range(5))
def test_codes_are_the_same_weights_for_a_symmetric_int8_kernel(number_format: Format, seed: int) -> None:
    """Up to seven bits with a zero point fit int8 without one, and dequantize to the same bits."""
    weight, quantizer = random_weight(number_format, seed)
    quantizer.codes = quantizer.nearest(weight)
    before = dequantize_codes(quantizer.codes, quantizer.scale, quantizer.zero_point)
    assert torch.equal(quantizer(None), before)
    quantizer.freeze()
    assert quantizer.frozen is not None
    assert quantizer.frozen.dtype == torch.int8
    assert torch.equal(quantizer(None), before)
    assert torch.equal(quantizer.frozen.float() * quantizer.scale.view(-1, 1, 1, 1), before)


@pytest.mark.parametrize(
    "number_format", [int8, uint8, int4, uint4, int4b64, int4b128, fp8], ids=lambda f: f.name
)
def test_decided_codes_compute_what_nearest_computed(number_format: Format) -> None:
    weight, quantizer = random_weight(number_format)
    on_the_fly = quantizer(weight)
    quantizer.codes = quantizer.nearest(weight)
    assert torch.equal(quantizer(weight), on_the_fly)
    codes = quantizer.codes.float()
    assert number_format.qmin <= int(codes.min()) <= int(codes.max()) <= number_format.qmax
    assert not torch.any(quantizer(None)[3])


def test_scales_are_kept_in_full_whatever_they_come_in() -> None:
    """DGQ-10: in half precision zero points beyond 2048 and small scales are not exact."""
    quantizer = ActivationQuantizer(uint8)
    scale, zero = torch.tensor(1e-7, dtype=torch.float64), torch.tensor(201.0, dtype=torch.float16)
    quantizer.set(scale, zero)
    assert quantizer.scale.dtype == torch.float32
    assert quantizer.zero_point.dtype == torch.int32
    assert float(quantizer.scale) == pytest.approx(1e-7, rel=1e-6)
    assert int(quantizer.half().zero_point) == 201


def test_another_grid_drops_codes() -> None:
    weight, quantizer = random_weight(int8)
    quantizer.codes = quantizer.nearest(weight)
    quantizer.set(*minmax_weights(weight, int8))
    assert quantizer.codes is None


def test_rounding_to_nearest_leaves_decided_codes_alone() -> None:
    layer = minmax_layer(nn.Conv2d(6, 3, 1), torch.randn(2, 6, 2, 2), int8, int8, split=(2, 4))
    decided = torch.zeros(3, 2, 1, 1, dtype=torch.int16)
    layer.weight_quantizers[0].codes = decided
    round_to_nearest(layer)
    first, second = layer.weight_quantizers
    assert first.codes is decided
    assert torch.equal(second.codes, second.nearest(layer.weight_parts()[1]))  # type: ignore[arg-type, operator]


# -- freezing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [int8, uint8], ids=lambda f: f.name)
@pytest.mark.parametrize("weights", [int8, int4, uint4], ids=lambda f: f.name)
def test_a_frozen_layer_computes_the_same_bits(
    layer_and_input: tuple[nn.Module, Tensor], weights: Format, activations: Format
) -> None:
    """What is calibrated is what is traced."""
    inner, x = layer_and_input
    layer = minmax_layer(inner, x, weights, activations)
    round_to_nearest(layer)
    before = layer(x)
    assert all(quantizer.codes.element_size() == 1 for quantizer in layer.weight_quantizers)
    freeze(layer)
    assert torch.equal(layer(x), before)
    assert all(quantizer.codes is None for quantizer in layer.weight_quantizers), "weights are held twice"


@pytest.mark.parametrize(
    ("weights", "activations"),
    [(fp8, fp8), (int4b64, None), (int4b128, None)],
    ids=lambda f: str(f and f.name),
)
def test_a_frozen_layer_computes_the_same_bits_in_floats_and_in_blocks(
    weights: Format, activations: Format | None
) -> None:
    x = torch.randn(3, 7, 192)
    layer = minmax_layer(nn.Linear(192, 8), x, weights, activations)
    round_to_nearest(layer)
    before = layer(x)
    freeze(layer)
    assert torch.equal(layer(x), before)
    assert layer.weight_quantizers[0].scale.shape == ((8, 3) if weights.block else (8,))  # 128 divides no 192


@pytest.mark.parametrize(
    ("activations", "dtype"), [(int8, torch.int8), (uint8, torch.uint8), (fp8, torch.float8_e4m3fn)]
)
def test_the_type_of_a_frozen_zero_point_is_the_code_type(activations: Format, dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(activations)
    quantizer.freeze()
    assert quantizer.frozen is not None
    assert quantizer.frozen.dtype == dtype
