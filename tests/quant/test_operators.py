"""The two operations of a quantized network are what ONNX defines, with a straight-through gradient."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qdeploy.quant.operators import (
    FLOAT8,
    code_type,
    dequantize_codes,
    fake_quantize,
    over_weight,
    round_through,
    to_grid,
)
from qdeploy.recipe.formats import FORMATS, Format, fp8, int4b64, int8, uint8

FINITE = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Format, Tensor, Tensor]:
    number_format = draw(st.sampled_from(list(FORMATS.values())))
    scale = torch.tensor(draw(st.floats(2.0**-10, 2.0**6, width=32)))
    zero = 0 if number_format.symmetric else draw(st.integers(number_format.qmin, number_format.qmax))
    return number_format, scale, torch.tensor(zero)


def quantized(x: Tensor, grid: tuple[Format, Tensor, Tensor]) -> Tensor:
    number_format, scale, zero = grid
    return to_grid(x, scale, zero, number_format)


@given(st.lists(FINITE, min_size=1, max_size=20), grids())
def test_quantizing_twice_is_quantizing_once(
    values: list[float], grid: tuple[Format, Tensor, Tensor]
) -> None:
    once = quantized(torch.tensor(values), grid)
    assert torch.equal(quantized(once, grid), once)


@given(grids())
def test_zero_stays_exactly_zero(grid: tuple[Format, Tensor, Tensor]) -> None:
    assert quantized(torch.zeros(1), grid).item() == 0.0


@given(st.lists(FINITE, min_size=1, max_size=20), grids())
def test_values_within_the_range_move_by_half_a_step_at_most(
    values: list[float], grid: tuple[Format, Tensor, Tensor]
) -> None:
    number_format, scale, zero = grid
    low, high = (number_format.qmin - zero) * scale, (number_format.qmax - zero) * scale
    x = torch.tensor(values)
    x_hat = quantized(x, grid)
    inside = (x >= low) & (x <= high)
    half: float | Tensor = 0.5
    if number_format.floating:  # of the code's own step, and of the step of the smallest codes
        fraction, exponent = number_format.fraction, number_format.exponent
        half = (x / scale).abs() / 2 ** (fraction + 1) + 2.0 ** (exponent - fraction) / 2
    assert torch.all(((x_hat - x).abs() <= scale * (half + 1e-3))[inside])
    assert torch.all((x_hat >= low) & (x_hat <= high))


@pytest.mark.parametrize(
    ("number_format", "code"),
    [(int8, TensorProto.INT8), (uint8, TensorProto.UINT8), (fp8, TensorProto.FLOAT8E4M3FN)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_torch_computes_what_onnx_runtime_computes(number_format: Format, code: int) -> None:
    """Ties too: both round half to even. And what is smaller or larger than any code."""
    scale, zero = np.float32(0.25), 0 if number_format.symmetric else 113
    ties = np.arange(-80, 80, dtype=np.float32) * 0.125
    tiny = np.arange(-16, 16, dtype=np.float32) * 2.0**-13
    wide = np.random.default_rng(0).normal(0, 20, 1000).astype(np.float32)
    x = np.concatenate([ties, tiny, wide, np.float32([115, 116, -1e30, 1e30])])
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x)])],
        [numpy_helper.from_array(np.asarray(scale), "s"), helper.make_tensor("z", code, [], [zero])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    frozen = torch.tensor(zero).to(code_type(number_format))
    operator = torch.ops.qdeploy.quantize_dequantize(torch.tensor(x), torch.tensor(scale), frozen)
    simulated = quantized(torch.tensor(x), (number_format, torch.tensor(scale), torch.tensor(zero)))
    assert np.array_equal(operator.numpy(), expected)
    assert torch.equal(operator, simulated)


def test_rounding_passes_the_gradient_unchanged() -> None:
    x = torch.tensor([0.2, 0.5, 1.5, -2.7], requires_grad=True)
    (round_through(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_gradient_of_the_step_is_that_of_lsq() -> None:
    """Esser et al. 2020, equation 3: ``round(v) - v`` within the range, the end of the range outside."""
    scale = torch.tensor(0.5, requires_grad=True)
    inside, above, below = 0.7, 100.0, -100.0
    for value, expected in ((inside, round(inside / 0.5) - inside / 0.5), (above, 7.0), (below, -8.0)):
        scale.grad = None
        fake_quantize(torch.tensor(value), scale, torch.tensor(0), -8, 7).backward()
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(expected, abs=1e-6)


def test_no_gradient_reaches_values_that_were_clipped() -> None:
    x = torch.tensor([0.3, 9.0, -9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), torch.tensor(0), -8, 7).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


def test_codes_are_dequantized_channel_by_channel() -> None:
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    scale, zero = torch.tensor([0.5, 2.0]), torch.tensor([1, 0])
    assert dequantize_codes(codes, scale, zero).tolist() == [[0.0, 0.5], [6.0, 8.0]]
    operator = torch.ops.qdeploy.dequantize(codes.to(torch.int8), scale)
    assert operator.tolist() == [[0.5, 1.0], [6.0, 8.0]]


# -- floats of 8 bits and blocks ---------------------------------------------------------------------------


def test_float8_codes_lie_on_the_grid_of_the_type_and_saturate() -> None:
    x = torch.linspace(-600, 600, 4001)
    codes = to_grid(x, torch.tensor(1.0), torch.tensor(0), fp8)
    assert torch.equal(codes.to(FLOAT8).float(), codes)
    assert codes.min() == -fp8.qmax
    assert codes.max() == fp8.qmax == torch.finfo(FLOAT8).max
    assert codes.isfinite().all()
    ties = torch.tensor([17.0, 19.0, -17.0, 2.0**-10])  # halfway between two codes
    assert to_grid(ties, torch.tensor(1.0), torch.tensor(0), fp8).tolist() == [16.0, 20.0, -16.0, 0.0]


def test_the_gradient_passes_float8_where_nothing_saturates() -> None:
    x, scale = torch.tensor([1.3, -2.7, 300.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    y = to_grid(x, scale, torch.tensor(0), fp8)
    y.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    codes = y.detach() / 0.5
    within = codes[:2] - x.detach()[:2] / 0.5
    assert scale.grad.item() == pytest.approx(float(within.sum() + fp8.qmax))


def test_blocks_are_dequantized_block_by_block() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int16).repeat(2, 8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    hat = dequantize_codes(codes, scale, torch.zeros(2, 2))
    for row in range(2):
        for block in range(2):
            part = slice(64 * block, 64 * block + 64)
            assert torch.equal(hat[row, part], codes[row, part] * scale[row, block])
    assert over_weight(scale, codes.shape).shape == codes.shape
    assert torch.equal(torch.ops.qdeploy.dequantize_blocks(codes.to(torch.int8), scale, int4b64.block), hat)
