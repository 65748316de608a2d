"""AdaRound: learned rounding of weights (Nagel et al., ICML 2020, arXiv 2004.10568).

Symbols as in the paper: each weight becomes ``s * (clamp(floor(w / s) + h(V) + z) - z)`` with the rectified
sigmoid ``h`` in [0, 1]; a regulariser pushes every h to 0 or 1; at the end the decision is made hard.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.calibrate.operators import per_channel
from qdeploy.formats import Format

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)`` (equation 23)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``V`` with ``rectified_sigmoid(V) == h``."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``f_reg = sum(1 - |2h - 1| ** beta)`` (equation 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(
    iteration: int, iterations: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0
) -> float | None:
    """The exponent of the regulariser: None during the warm-up, then linear from ``start`` to ``end``."""
    begin = warmup * iterations
    if iteration < begin:
        return None
    return start + (end - start) * (iteration - begin) / (iterations - begin)


class AdaRound(nn.Module):
    """Soft rounding of one weight on a fixed grid.

    Args:
        weight: [C, ...] float weights.
        scale: [C] steps.
        zero_point: [C] codes of zero.
        number_format: the grid.
    """

    floor: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, number_format: Format) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", per_channel(scale, weight.ndim))
        self.register_buffer("zero_point", per_channel(zero_point, weight.ndim).to(weight.dtype))
        steps = weight / self.scale
        self.register_buffer("floor", steps.floor())
        self.v = nn.Parameter(inverse_rectified_sigmoid(steps - self.floor))

    def h(self) -> Tensor:
        """The share of the way up that each weight takes, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def _dequantize(self, up: Tensor) -> Tensor:
        codes = (self.floor + up + self.zero_point).clamp(self.format.qmin, self.format.qmax)
        return (codes - self.zero_point) * self.scale

    def forward(self) -> Tensor:
        """The soft weight."""
        return self._dequantize(self.h())

    def codes(self) -> Tensor:
        """The decided codes, int16: up where ``h >= 0.5``."""
        up = (self.v >= 0).to(self.floor.dtype)
        codes = (self.floor + up + self.zero_point).clamp(self.format.qmin, self.format.qmax)
        return codes.to(torch.int16)
