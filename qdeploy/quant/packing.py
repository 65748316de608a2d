"""Codes of less than 8 bits without gaps, as a checkpoint stores them and a quantizer holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.quant.nvfp4 import from_nibbles, nibbles
from qdeploy.quant.operators import code_type
from qdeploy.recipe.formats import Format, unsigned


def fills_bytes(number_format: Format) -> bool:
    """Whether a byte holds two codes or more, and none in part."""
    return not number_format.floating and number_format.bits < 8 and 8 % number_format.bits == 0


def pack(codes: Tensor, number_format: Format) -> Tensor:
    """Codes as stored: those of less than 8 bits one after the other without gaps, low bits first.

    Two codes of 4 bits are a byte, eight of 3 bits are three bytes. Codes of float4 are packed as their bits.
    """
    if number_format.bits >= 8:
        return codes.to(code_type(number_format))
    if number_format.floating:
        return pack(nibbles(codes), unsigned(number_format.bits))
    flat = (codes.flatten() - number_format.qmin).to(torch.uint8)
    if (shifts := _whole(number_format, flat.device)) is not None:
        places = torch.nn.functional.pad(flat, (0, -flat.numel() % len(shifts))).view(-1, len(shifts))
        return (places << shifts).sum(1, dtype=torch.uint8)
    bits = (flat[:, None] >> torch.arange(number_format.bits, dtype=torch.uint8)) & 1
    stream = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _whole(number_format: Format, device: torch.device) -> Tensor | None:
    """Where in a byte its codes begin; None where codes cross bytes. The common case, and a fraction of the work."""
    if 8 % number_format.bits:
        return None
    return torch.arange(0, 8, number_format.bits, dtype=torch.uint8, device=device)


def unpack(stored: Tensor, number_format: Format, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`: codes of the given shape, in the type of their format."""
    if number_format.floating and number_format.bits < 8:
        return from_nibbles(unpack(stored, unsigned(number_format.bits), shape))
    if number_format.floating:
        return stored.view(shape)
    if number_format.bits >= 8:
        return stored.to(code_type(number_format)).view(shape)
    count = torch.Size(shape).numel()
    if (shifts := _whole(number_format, stored.device)) is not None:
        flat: Tensor = ((stored[:, None] >> shifts) & (2**number_format.bits - 1)).flatten()[:count]
        return (flat.to(code_type(number_format)) + number_format.qmin).view(shape)
    stream = ((stored[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    bits = stream[: count * number_format.bits].view(count, number_format.bits).to(torch.int16)
    codes = (bits << torch.arange(number_format.bits, dtype=torch.int16)).sum(1, dtype=torch.int16)
    return (codes + number_format.qmin).to(code_type(number_format)).view(shape)


def packed_bytes(count: int, number_format: Format) -> int:
    """Bytes that so many codes take as stored."""
    return -(-count * number_format.bits // 8)
