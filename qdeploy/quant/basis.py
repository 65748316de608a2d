"""Transforms of a layer's input before its quantizer (rotation, shift), and a low-rank branch parallel to the layer.

None of them changes a layer's function. With an orthogonal R, ``(x R) (W R)^T = x W^T`` (QuaRot, arXiv 2404.00456);
and with any two factors, ``x W^T = x (W - (D U)^T)^T + (x D) U`` (SVDQuant, arXiv 2411.05007, equation 5); and
with any m, ``x W^T = (x - m) W^T + W m``, where padding is done first (Outlier Suppression+, arXiv 2304.09145). Only
what is quantized changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def hadamard(size: int) -> Tensor:
    """The symmetric orthogonal [size, size] Hadamard matrix (Sylvester's construction).

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = (matrix / size**0.5).float()
    return scaled


def rotate(x: Tensor, rotation: Tensor, axis: int) -> Tensor:
    """Multiply each block of channels by one matrix.

    Args:
        x: its channels are whole blocks.
        rotation: [n, n].
        axis: the axis that holds the channels: 1, or -1.
    """
    if axis != -1:
        return rotate(x.movedim(axis, -1), rotation, -1).movedim(-1, axis)
    rotated: Tensor = (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)
    return rotated


def low_rank(x: Tensor, down: Tensor, up: Tensor, axis: int) -> Tensor:
    """The product with ``down @ up``, as two skinny ones.

    Args:
        x: input of a linear layer, or of a convolution of one pixel.
        down: [C, rank].
        up: [rank, O].
        axis: the axis that holds the channels: 1, or -1.
    """
    if axis != -1:
        return low_rank(x.movedim(axis, -1), down, up, -1).movedim(-1, axis)
    return x @ down @ up


def padded(x: Tensor, inner: nn.Conv2d) -> Tensor:
    """The input of a convolution with its zeros around it, so that the convolution itself needs none.

    Args:
        x: [B, C, H, W].
        inner: tells the padding, as numbers.
    """
    rows, columns = (int(size) for size in inner.padding)
    return nn.functional.pad(x, (columns, columns, rows, rows)) if rows or columns else x


def shift_bias(weight: Tensor, shift: Tensor) -> Tensor:
    """[O] what a layer computes from a constant input.

    Args:
        weight: [O, C, ...].
        shift: [C] the input.
    """
    return weight.flatten(2).sum(2) @ shift if weight.ndim > 2 else weight @ shift
