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

from qdeploy.calibrate.operators import dequantize_codes, fake_quantize, round_through
from qdeploy.formats import FORMATS, Format, integer, unsigned

FINITE = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Format, Tensor, Tensor]:
    number_format = draw(st.sampled_from(list(FORMATS.values())))
    scale = torch.tensor(draw(st.floats(2.0**-10, 2.0**6, width=32)))
    zero = 0 if number_format.symmetric else draw(st.integers(number_format.qmin, number_format.qmax))
    return number_format, scale, torch.tensor(zero)


def quantized(x: Tensor, grid: tuple[Format, Tensor, Tensor]) -> Tensor:
    number_format, scale, zero = grid
    return fake_quantize(x, scale, zero, number_format.qmin, number_format.qmax)


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
    assert torch.all((x_hat - x).abs()[inside] <= scale * (0.5 + 1e-3))
    assert torch.all((x_hat >= low) & (x_hat <= high))


@pytest.mark.parametrize(("number_format", "code"), [(integer(8), np.int8), (unsigned(8), np.uint8)])
def test_torch_computes_what_onnx_runtime_computes(number_format: Format, code: type) -> None:
    """Ties too: both round half to even."""
    scale, zero = np.float32(0.25), code(0 if number_format.symmetric else 113)
    ties = np.arange(-80, 80, dtype=np.float32) * 0.125
    x = np.concatenate([ties, np.random.default_rng(0).normal(0, 20, 1000).astype(np.float32)])
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x)])],
        [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(np.asarray(zero), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    frozen = torch.tensor(zero)
    operator = torch.ops.qdeploy.quantize_dequantize(torch.tensor(x), torch.tensor(scale), frozen)
    simulated = quantized(torch.tensor(x), (number_format, torch.tensor(scale), torch.tensor(int(zero))))
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
