"""Attention-aware quantization of the softmax output on a logarithmic scale (DGQ, arXiv 2501.04304), simulated.

The row of a cross-attention has two peaks: the start token takes nearly all of it, and the few per cent that
the words get decide what is drawn. Codes are powers of two below the largest probability of the words; the
start token bypasses them. Departures from the released code, each for a reason:

- the largest probability is that of the sample; the code's is that of the batch, so images change each other;
- one code represents zero; the released code's smallest step is a floor, which assigns mass to thousands of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogQuantizer(nn.Module):
    """``d 2^-q`` with ``q = round(-log2(a / d))``, d the sample's largest; the last code is zero.

    Args:
        bits: width of a code.
        start: whether the first key is the start token, which stays as it is.
    """

    def __init__(self, bits: int, start: bool = False) -> None:
        super().__init__()
        self.bits, self.start = bits, start
        self.enabled = True

    def forward(self, probabilities: Tensor) -> Tensor:
        """Quantize [B, heads, queries, keys]."""
        if not self.enabled:
            return probabilities
        kept = int(self.start)
        first, rest = probabilities[..., :kept], probabilities[..., kept:]
        return torch.cat([first, log_quantize(rest, self.bits)], -1) if rest.shape[-1] else probabilities

    def restore(self, output: Tensor) -> Tensor:
        """Nothing was taken out of what is quantized."""
        return output


def log_quantize(a: Tensor, bits: int) -> Tensor:
    """Quantize non-negative values [B, ...] to powers of two below the largest of each sample, or zero."""
    axes = tuple(range(1, a.ndim))
    largest = a.amax(axes, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    zero = 2**bits - 1
    codes = (-torch.log2((a / largest).clamp(min=torch.finfo(a.dtype).tiny))).round().clamp(0, zero)
    codes = torch.where(a > 0, codes, zero)
    return torch.where(codes < zero, largest * torch.exp2(-codes), torch.zeros_like(a))


def split_start(probabilities: Tensor, value: Tensor) -> Tensor:
    """``A[:, :1] V[:1] + A[:, 1:] V[1:]``, which is A V: the start token's part on its own.

    Args:
        probabilities: A, [..., queries, keys].
        value: V, [..., keys, features].
    """
    start = probabilities[..., :1] @ value[..., :1, :]
    words: Tensor = probabilities[..., 1:] @ value[..., 1:, :]
    return start + words
