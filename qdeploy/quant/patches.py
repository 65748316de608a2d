"""Convolutions whose im2col matrix is quantized in groups (DGQ, arXiv 2501.04304), simulated.

The matrix has a row for each input channel and kernel position and a column for each output pixel. A row's scale
is inside the sum, and one value of the input, which is in as many rows as the kernel has positions, gets as
many codes; an output pixel's scale is outside the sum, and one value gets as many codes as there are pixels
that read it. A convolution kernel reads one code, so no engine computes this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qdeploy.quant.operators import to_grid
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.system.errors import CapabilityError

# What scales run along.
ROWS, PIXELS = "rows", "pixels"
SIMULATED = "a convolution kernel forms no im2col matrix whose rows or pixels could have scales of their own"
# The axis of scales in what the quantizer is given: its channels, and its pixels in one axis.
AXES = {ROWS: 1, PIXELS: -1}


def shifted(inner: nn.Conv2d, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """What each kernel position reads of an input [B, C, H, W].

    Together they are the im2col matrix, which is never formed: it is as many times as large as the input.

    Returns:
        Row and column of the kernel position, and a view [B, C, H', W'] of the padded input, of the
        output's height and width.
    """
    mode = "constant" if inner.padding_mode == "zeros" else inner.padding_mode
    padded = nn.functional.pad(x, inner._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = inner.kernel_size, inner.stride, inner.dilation
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    for i in range(kh):
        for j in range(kw):
            top, left = i * dh, j * dw
            yield i, j, padded[:, :, top : top + sh * height : sh, left : left + sw * width : sw]


class PatchQuantizer(ActivationQuantizer):
    """Quantization of a convolution's im2col matrix in place of its input.

    Scales [A], or [K, A] with groups of timesteps: A counts kernel positions × channels, position by position,
    or output pixels.
    """

    @property
    def along(self) -> str:
        """A word for what the scales run along, for messages."""
        return "channels" if self.axis == AXES[ROWS] else PIXELS

    @property
    def hoisted(self) -> bool:
        """Never: it is a simulation, which scales where the paper's code does."""
        return False

    def freeze(self) -> None:
        """A simulation cannot be exported.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(f"{SIMULATED}: this is a simulation")

    def forward(self, x: Tensor, position: int = 0) -> Tensor:
        """What one kernel position reads, quantized.

        Args:
            x: [B, C, H', W'], of `shifted`.
            position: its number.
        """
        if self.axis is None or not self.enabled:
            return super().forward(x)
        scale, zero_point, seen = self.scale, self.zero_point, x
        if self.axis == AXES[PIXELS]:
            seen = x.flatten(2)
        else:
            own = slice(position * x.shape[1], (position + 1) * x.shape[1])
            scale, zero_point = scale[..., own], zero_point[..., own]
        codes = to_grid(seen, self._over(scale, seen), self._over(zero_point, seen), self.format)
        return codes.view(x.shape)


def convolve(
    inner: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: PatchQuantizer
) -> Tensor:
    """The product of a weight and the quantized im2col matrix: a sum over kernel positions.

    Args:
        inner: has kernel, stride, padding, dilation and groups.
        x: [B, C, H, W].
        weight: [O, C / groups, kh, kw].
        bias: [O], or None.
        quantizer: of the matrix.
    """
    parts = (
        nn.functional.conv2d(quantizer(seen, number), weight[:, :, i : i + 1, j : j + 1], groups=inner.groups)
        for number, (i, j, seen) in enumerate(shifted(inner, x))
    )
    product = functools.reduce(torch.add, parts)
    return product if bias is None else product + bias[:, None, None]
