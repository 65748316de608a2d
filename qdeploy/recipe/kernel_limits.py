"""Layers that are too thin to gain from low bits.

Their kernels are bound by memory, or do not exist: what Q and DQ cost is never earned back. Source of the
sizes: the exclusions of nvidia-modelopt 0.47 (`onnx/quantization/graph_utils.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

CHANNELS = 16  # below, a layer is thin
FLOAT_KERNEL = 32  # positions of a kernel; above, fp8 has no convolution


def thin_conv(weight: Sequence[int], group: int = 1, first: bool = False) -> bool:
    """Whether an int8 convolution is too thin for a fast kernel.

    Args:
        weight: (out, in / group, height, width).
        group: of the convolution.
        first: whether it reads what the network is given.
    """
    out, inner, kernel = weight[0], weight[1] * group, weight[2:]
    if out >= CHANNELS and inner >= CHANNELS:
        return False
    if group > 1:
        return not (out % 8 == 0 and min(kernel) >= 3)
    square, aligned = len(set(kernel)) == 1, out % 8 == 0 or inner % 8 == 0
    return not (square and aligned and (first or max(out, inner) >= CHANNELS))


def thin_float_conv(weight: Sequence[int], group: int = 1) -> bool:
    """Whether an fp8 convolution is too thin, or its kernel too large; arguments as for `thin_conv`."""
    return prod(weight[2:]) > FLOAT_KERNEL or min(weight[0], weight[1] * group) <= CHANNELS


def thin_product(columns: int, inner: int, rows: int | None = None) -> bool:
    """Whether a product of (rows, inner) by (inner, columns) is too thin to be worth it."""
    return rows == 1 or columns == 1 or min(columns, inner) < CHANNELS
