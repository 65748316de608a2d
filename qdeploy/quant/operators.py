"""The arithmetic operations of a quantized network, and how they are written in ONNX.

They are registered with torch, so that the exporter meets them in the traced graph and writes each as the
very ONNX operators that compute the same function: the graph computes what the simulation computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.recipe.formats import Format

FLOAT8 = torch.float8_e4m3fn


class _Round(torch.autograd.Function):
    """Rounding half to even, as QuantizeLinear rounds, with the straight-through gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept for the gradient."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _RoundFloat8(_Round):
    """Rounding half to even to the nearest float8, with the straight-through gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(FLOAT8).to(x.dtype)


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return _apply(_Round, x)


def _apply(function: type[_Round], x: Tensor) -> Tensor:
    """A rounding; without a gradient it is not made a function of autograd, which takes longer than it does."""
    rounded: Tensor = function.apply(x) if torch.is_grad_enabled() else function.forward(x)
    return rounded


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Quantize and dequantize: ``(clamp(round(x / scale) + zero_point) - zero_point) * scale``.

    Args:
        x: any tensor.
        scale: positive, a scalar or broadcastable to ``x``.
        zero_point: integral values in ``[qmin, qmax]``, shaped like ``scale``.
        qmin: smallest code.
        qmax: largest code.

    Differentiable in ``x`` and ``scale`` with straight-through rounding (LSQ, Esser et al. 2020, section 2).
    """
    zero = zero_point.to(x.dtype)
    codes = (round_through(x / scale) + zero).clamp(qmin, qmax)
    return (codes - zero) * scale


def fake_quantize_float8(x: Tensor, scale: Tensor) -> Tensor:
    """`fake_quantize` with float8 (E4M3) codes, which saturate: ``float8(clamp(x / scale)) * scale``."""
    largest = torch.finfo(FLOAT8).max
    return _apply(_RoundFloat8, (x / scale).clamp(-largest, largest)) * scale


def spacing(x: Tensor, number_format: Format) -> Tensor:
    """The distance between the two numbers of a float format that ``x`` lies between; of the larger two at a code."""
    _, exponent = torch.frexp(x)  # |x| = m * 2**exponent with m in [0.5, 1)
    return torch.exp2((exponent - 1).clamp(min=number_format.exponent) - number_format.fraction).to(x.dtype)


def round_float(x: Tensor, number_format: Format) -> Tensor:
    """Round half to even to the nearest number of a float format, which saturates; the gradient passes inside."""
    inside = x.clamp(number_format.qmin, number_format.qmax)
    step = spacing(inside.detach(), number_format)
    return round_through(inside / step) * step


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, number_format: Format) -> Tensor:
    """Quantize and dequantize in any format; arguments as for `fake_quantize`."""
    if number_format.bits == 8 and number_format.floating:
        return fake_quantize_float8(x, scale)
    if number_format.floating:
        return round_float(x / scale, number_format) * scale
    return fake_quantize(x, scale, zero_point, number_format.qmin, number_format.qmax)


def code_type(number_format: Format) -> torch.dtype:
    """The type that codes are held in, float4 in float8; integers of more than 8 bits exist in tests alone."""
    if number_format.floating:
        return FLOAT8
    if number_format.bits > 8:
        return torch.int16
    return torch.int8 if number_format.symmetric else torch.uint8


def per_channel(values: Tensor, ndim: int) -> Tensor:
    """Reshape one value per output channel so that it broadcasts over a weight of ``ndim`` axes."""
    return values.view(-1, *[1] * (ndim - 1))


def over_weight(values: Tensor, shape: torch.Size) -> Tensor:
    """Spread the scales or zero points of a weight so that they broadcast over it.

    Args:
        values: [C], one per output channel; or [C, blocks], one per block of input features too.
        shape: of the weight, [C, ...].
    """
    if values.ndim == 1:
        return per_channel(values, len(shape))
    spread = values.repeat_interleave(shape[1] // values.shape[1], dim=1)
    return spread.view(*spread.shape, *[1] * (len(shape) - 2))


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(codes - zero_point) * scale``; scale and zero point as for `over_weight`."""
    zero = over_weight(zero_point, codes.shape).to(scale.dtype)
    return (codes.to(scale.dtype) - zero) * over_weight(scale, codes.shape)


@torch.library.custom_op("qdeploy::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`fake_quantize` over the whole range of the type of ``zero_point``."""
    if zero_point.dtype == FLOAT8:
        return fake_quantize_float8(x, scale)
    codes = torch.iinfo(zero_point.dtype)
    return fake_quantize(x, scale, zero_point, codes.min, codes.max)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qdeploy::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """`dequantize_codes` with zero point 0."""
    return dequantize_codes(codes, scale, torch.zeros_like(scale))


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("qdeploy::dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """`dequantize_codes` with zero point 0 and one scale for ``block`` input features."""
    return dequantize_codes(codes, scale, torch.zeros_like(scale))


@dequantize_blocks.register_fake
def _(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """The ONNX form of these operators, for ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import opset21 as op

    def write_quantize_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def write_dequantize(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    def write_dequantize_blocks(codes: Any, scale: Any, block: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=1, block_size=block)

    return {
        torch.ops.qdeploy.quantize_dequantize.default: write_quantize_dequantize,
        torch.ops.qdeploy.dequantize.default: write_dequantize,
        torch.ops.qdeploy.dequantize_blocks.default: write_dequantize_blocks,
    }
