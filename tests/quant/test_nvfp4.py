"""NVFP4 against numpy and ml_dtypes, which know nothing of this package: codes, ties, scales, blocks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdeploy.quant.nvfp4 import (
    CODES,
    fake_quantize_nvfp4,
    float8_scales,
    from_nibbles,
    nibbles,
    tensor_scale,
    two_level_scales,
)
from qdeploy.quant.operators import FLOAT8, round_float, spacing
from qdeploy.quant.packing import pack, packed_bytes, unpack
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.quant.ranges import WEIGHT_FINDERS
from qdeploy.recipe.formats import fp8, nvfp4

EVERY = torch.tensor([sign * code for sign in (1, -1) for code in CODES])
SEEDS = st.integers(0, 2**32 - 1)


def to_type(values: Any, kind: Any) -> Any:
    """Values that saturate, in a small type and back."""
    largest = float(ml_dtypes.finfo(kind).max)
    return np.clip(np.asarray(values, np.float32), -largest, largest).astype(kind).astype(np.float32)


def dynamic(x: Any, whole: float) -> Any:
    """TensorRT's dynamic quantization as its documentation writes it, block after block."""
    out = np.empty_like(x)
    for index in np.ndindex(*x.shape[:-1]):
        for start in range(0, x.shape[-1], 16):
            block = x[index][start : start + 16]
            scale = to_type(np.abs(block).max() / np.float32(6) / np.float32(whole), ml_dtypes.float8_e4m3fn)
            step = np.float32(scale * np.float32(whole))
            codes = to_type(block / step, ml_dtypes.float4_e2m1fn) if step > 0 else np.zeros_like(block)
            out[index][start : start + 16] = codes * step
    return out


def drawn(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=generator).mul(spread).exp()
    return torch.randn(shape, generator=generator) * size


def test_there_are_sixteen_codes_and_they_are_those_of_e2m1() -> None:
    stored = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert from_nibbles(torch.arange(16)).float().numpy().tolist() == stored.tolist()
    assert nibbles(from_nibbles(torch.arange(16))).tolist() == list(range(16))  # the negative zero too
    assert torch.equal(round_float(EVERY, nvfp4), EVERY)


@pytest.mark.parametrize(
    ("number_format", "kind"), [(nvfp4, ml_dtypes.float4_e2m1fn), (fp8, ml_dtypes.float8_e4m3fn)]
)
def test_numbers_round_half_to_even_and_saturate(number_format: Any, kind: Any) -> None:
    """Every code, every middle between two, their neighbours in float32, and numbers beyond the range."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.unique(to_type(codes[np.isfinite(codes)], kind))
    middles = (codes[1:] + codes[:-1]) / 2
    points = np.concatenate([codes, middles, codes * 2])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    assert np.array_equal(round_float(torch.from_numpy(points), number_format).numpy(), to_type(points, kind))


@given(SEEDS)
def test_activations_are_rounded_as_the_runtime_rounds_them(seed: int) -> None:
    x = drawn(seed, 3, 5, 64)
    x[0, 0, :16] = 0.0
    whole = tensor_scale(x.abs().max() / 6)
    assert np.array_equal(fake_quantize_nvfp4(x, whole).numpy(), dynamic(x.numpy(), float(whole)))


def test_block_scales_saturate_beyond_the_calibrated_range_and_underflow_to_zeros() -> None:
    whole = torch.tensor(2.0**-6)
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 1] = 6 * 448 * 2.0**-6 * 8, 1.0  # eight times what was calibrated
    x[0, 16:32] = 2.0**-6 * 2.0**-11
    given_back = fake_quantize_nvfp4(x, whole)
    assert given_back[0, 0] == 6 * 448 * 2.0**-6
    assert not given_back[0, 1:].any()
    assert np.array_equal(given_back.numpy(), dynamic(x.numpy(), float(whole)))


@given(SEEDS, st.floats(1e-6, 1e6))
def test_the_tensors_scale_is_the_least_power_of_two_that_reaches_the_largest_block(
    seed: int, size: float
) -> None:
    scale = drawn(seed, 20).abs() * size + 1e-6
    whole = float(tensor_scale(scale))
    assert np.log2(whole) % 1 == 0
    assert float(scale.max()) <= 448 * whole
    assert whole == 2.0**-24 or float(scale.max()) > 448 * whole / 2


@given(SEEDS)
def test_scales_of_weights_are_float8_times_a_power_of_two_and_stay_so(seed: int) -> None:
    scale = two_level_scales(drawn(seed, 8, 4).abs() + 1e-5)
    assert torch.equal(two_level_scales(scale), scale)
    stored, whole = float8_scales(scale)
    assert stored.dtype == FLOAT8
    assert torch.equal(stored.float() * whole, scale)
    assert bool((scale > 0).all())


@pytest.mark.parametrize("finder", ["minmax", "lp"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_are_the_same_in_16_bits_in_whatever_order_they_are_multiplied(
    finder: str, kind: torch.dtype
) -> None:
    weight = drawn(1, 24, 64, spread=0.5) * 0.05
    weight[3, 16:32] = 0.0
    quantizer = WeightQuantizer(nvfp4, 24, 64)
    quantizer.set(*WEIGHT_FINDERS[finder](weight, nvfp4))
    assert float(quantizer.scale.max()) < 0.1  # the block of zeros does not count
    simulated = quantizer(weight)
    quantizer.codes = quantizer.nearest(weight)
    codes, (blocks, whole) = quantizer.codes, float8_scales(quantizer.scale)
    spread = blocks.to(kind).repeat_interleave(16, 1)
    for product in ((codes.to(kind) * spread) * whole.to(kind), codes.to(kind) * (spread * whole.to(kind))):
        assert torch.equal(product.float(), simulated)
    quantizer.freeze()
    assert torch.equal(quantizer(None), simulated)


def test_a_searched_range_has_less_error_than_the_extremes() -> None:
    weight = drawn(2, 16, 128, spread=0.5)
    errors = {}
    for finder in ("minmax", "lp"):
        quantizer = WeightQuantizer(nvfp4, 16, 128)
        quantizer.set(*WEIGHT_FINDERS[finder](weight, nvfp4))
        errors[finder] = float((quantizer(weight) - weight).abs().pow(2.4).mean())
    assert errors["lp"] < errors["minmax"]


def test_codes_are_stored_in_four_bits() -> None:
    codes = EVERY.to(FLOAT8).view(4, 4)
    stored = pack(codes, nvfp4)
    assert stored.dtype == torch.uint8
    assert len(stored) == packed_bytes(16, nvfp4) == 8
    assert torch.equal(unpack(stored, nvfp4, (4, 4)).view(torch.uint8), codes.view(torch.uint8))


def test_gradients_pass_inside_of_the_range_and_through_the_blocks() -> None:
    x = torch.linspace(-1, 1, 32, requires_grad=True)
    fake_quantize_nvfp4(x, torch.tensor(2.0**-10)).sum().backward()
    assert x.grad is not None
    assert float(x.grad.mean()) == pytest.approx(1.0, abs=0.1)


def test_a_quantizer_that_is_exported_computes_the_same() -> None:
    quantizer, x = ActivationQuantizer(nvfp4), drawn(3, 4, 32)
    quantizer.set(x.abs().max() / 6, torch.tensor(0))
    simulated = quantizer(x)
    assert not torch.equal(simulated, x)
    quantizer.freeze()
    assert torch.equal(quantizer(x), simulated)


def test_the_gap_between_two_codes() -> None:
    x = torch.tensor([0.0, 0.3, 0.9, 1.2, 1.9, 2.5, 3.9, 4.5, 5.9])
    assert spacing(x, nvfp4).tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0]
