"""The two arithmetic operations of a quantized network, and how they are written in ONNX.

They are registered with torch, so that the exporter meets them in the traced graph and writes each as the
very ONNX operators that compute the same function: what the simulation did is what the graph says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    rounded: Tensor = _Round.apply(x)
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


def per_channel(values: Tensor, ndim: int) -> Tensor:
    """Reshape one value per output channel so that it broadcasts over a weight of ``ndim`` axes."""
    return values.view(-1, *[1] * (ndim - 1))


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(codes - zero_point) * scale``, per output channel (axis 0)."""
    zero = per_channel(zero_point, codes.ndim).to(scale.dtype)
    return (codes.to(scale.dtype) - zero) * per_channel(scale, codes.ndim)


@torch.library.custom_op("qdeploy::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`fake_quantize` over the whole range of the integer type of ``zero_point``."""
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


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """The ONNX form of both operators, for ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import opset21 as op

    def write_quantize_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def write_dequantize(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0)

    return {
        torch.ops.qdeploy.quantize_dequantize.default: write_quantize_dequantize,
        torch.ops.qdeploy.dequantize.default: write_dequantize,
    }
