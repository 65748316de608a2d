"""NVFP4: float4 codes (E2M1) in blocks of 16 features, a float8 scale (E4M3) for each, and one scale for the tensor.

As NVIDIA's Blackwell multiplies it (Pretraining Large Language Models with NVFP4, arXiv 2509.25149, section 2 and
appendix B): with the tensor's scale t, a block's scale is ``s = float8(max|x| / 6 / t)`` and its codes are
``float4(x / (s t))``, both rounded half to even and saturating. Weights are stored so; activations are rounded so by
the runtime in every call, with t alone known before (TensorRT's ``TRT_FP4DynamicQuantize``).

Here t is a power of two, the smallest with which the largest block scale is no more than 448. Float8 keeps its
precision over 15 binades, so nothing is lost, and every product of code, block scale and t is exact in float32,
float16 and bfloat16, in whatever order a kernel multiplies: the simulated weight is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdeploy.quant.operators import FLOAT8, dequantize_codes, fake_quantize_float8, round_float
from qdeploy.recipe.formats import nvfp4

_LARGEST = torch.finfo(FLOAT8).max
_SMALLEST = 2.0**-9  # float8
_FLOAT8E4M3FN = 17  # onnx's number of the type
_LEAST = 2.0**-24  # of the tensor's scale: the smallest half
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by the three low bits; the fourth is the sign


def tensor_scale(scale: Tensor) -> Tensor:
    """[] the tensor's scale t.

    Args:
        scale: of blocks, or the one that would serve the whole tensor: ``max|x| / 6``.
    """
    fraction, exponent = torch.frexp(scale.max().float() / _LARGEST)  # 0.5 is a power of two itself
    power: Tensor = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())
    return power.clamp(min=_LEAST)


def two_level_scales(scale: Tensor, whole: Tensor | None = None) -> Tensor:
    """The nearest scales of blocks that are a float8 times the tensor's scale, shaped as they are; none is 0.

    Args:
        scale: positive.
        whole: the tensor's scale; by default that of these.
    """
    whole = tensor_scale(scale) if whole is None else whole
    return fake_quantize_float8(scale.float(), whole).clamp(min=_SMALLEST * float(whole))


def float8_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of `two_level_scales` as the float8 numbers that they are multiples by, and the tensor's scale."""
    whole = tensor_scale(scale)
    return (scale / whole).to(FLOAT8), whole


@torch.library.custom_op("qdeploy::fake_quantize_nvfp4", mutates_args=())
def _fake_quantize(x: Tensor, whole: Tensor) -> Tensor:
    return fake_quantize_nvfp4(x, whole)


@_fake_quantize.register_fake
def _(x: Tensor, whole: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qdeploy::dequantize_nvfp4", mutates_args=())
def _dequantize(codes: Tensor, blocks: Tensor, whole: Tensor) -> Tensor:
    scale = blocks.to(whole.dtype) * whole
    return dequantize_codes(codes, scale, torch.zeros_like(scale))


@_dequantize.register_fake
def _(codes: Tensor, blocks: Tensor, whole: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=whole.dtype)


def fake_quantize_nvfp4(x: Tensor, whole: Tensor) -> Tensor:
    """Round activations as the runtime does; differentiable in ``x`` with straight-through rounding.

    Args:
        x: [..., features], in whole blocks.
        whole: [] the tensor's scale.
    """
    blocks = x.unflatten(-1, (-1, nvfp4.block))
    largest = blocks.detach().abs().amax(-1, keepdim=True)
    scale = fake_quantize_float8(largest / nvfp4.largest, whole)
    steps = blocks / torch.where(scale > 0, scale, 1.0)  # where the scale underflows, everything becomes 0
    return (round_float(steps, nvfp4) * scale).flatten(-2)


def nibbles(codes: Tensor) -> Tensor:
    """Codes as the numbers from 0 to 15 that they are stored as."""
    magnitudes = torch.tensor(CODES, device=codes.device)
    places = torch.searchsorted(magnitudes, codes.float().abs().contiguous())
    return (places + 8 * torch.signbit(codes.float())).to(torch.uint8)


def from_nibbles(stored: Tensor) -> Tensor:
    """Undo `nibbles`."""
    magnitudes = torch.tensor(CODES, device=stored.device)[(stored & 7).long()]
    return torch.where(stored >= 8, -magnitudes, magnitudes).to(FLOAT8)


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """The ONNX form of these operators; codes become FLOAT4E2M1 in `qdeploy.export.passes.packed_codes`."""
    from onnxscript import opset21 as op

    quantize = _dynamic_quantize()

    def write_fake_quantize(x: Any, whole: Any) -> Any:
        codes, scales = quantize(x, whole, axis=-1, block_size=nvfp4.block, scale_type=_FLOAT8E4M3FN)
        scale = op.DequantizeLinear(scales, whole)
        return op.DequantizeLinear(codes, scale, axis=-1, block_size=nvfp4.block)

    def write_dequantize(codes: Any, blocks: Any, whole: Any) -> Any:
        scale = op.DequantizeLinear(blocks, whole)
        return op.DequantizeLinear(codes, scale, axis=1, block_size=nvfp4.block)

    return {
        torch.ops.qdeploy.fake_quantize_nvfp4.default: write_fake_quantize,
        torch.ops.qdeploy.dequantize_nvfp4.default: write_dequantize,
    }


def _dynamic_quantize() -> Any:
    """TensorRT's operator, which onnx has no schema of."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def port(name: str, kind: str) -> Any:
        return OpSchema.FormalParameter(name, f"tensor({kind})")

    name = "TRT_FP4DynamicQuantize"
    schema = OpSchema(
        name,
        "trt",
        1,
        inputs=[port("x", "float"), port("scale", "float")],
        outputs=[port("y", "float4e2m1"), port("y_scale", "float8e4m3fn")],
        attributes=[
            OpSchema.Attribute(each, OpSchema.AttrType.INT) for each in ("axis", "block_size", "scale_type")
        ],
    )
    return Op(Opset("trt", 1), name, schema)
