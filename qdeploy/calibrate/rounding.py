"""AdaRound: learned rounding of weights (Nagel et al., ICML 2020, arXiv 2004.10568).

Symbols as in the paper: each weight becomes ``s * (clamp(floor(w / s) + h(V) + z) - z)`` with the rectified
sigmoid ``h`` in [0, 1]; a regulariser pushes every h to 0 or 1; at the end the decision is made hard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qdeploy.calibrate.reconstruct import Problem, optimize
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import code_type, over_weight, spacing
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.recipe.formats import Format

ZETA, GAMMA = 1.1, -0.1
PAPER_STEPS, PAPER_LR = 20000, 1e-3  # of BRECQ, Q-Diffusion and TFMQ-DM


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


class SoftRounding(nn.Module):
    """Soft rounding of one weight on a fixed grid, between the two codes around it: on a grid of floats too.

    Args:
        weight: [C, ...] float weights.
        scale: [C] steps, or [C, blocks].
        zero_point: codes of zero, shaped like ``scale``.
        number_format: the grid.
    """

    floor: Tensor
    gap: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, number_format: Format) -> None:
        super().__init__()
        self.format = number_format
        self.register_buffer("scale", over_weight(scale, weight.shape))
        self.register_buffer("zero_point", over_weight(zero_point, weight.shape).to(weight.dtype))
        steps = weight / self.scale
        gap = steps.new_ones(())
        if number_format.floating:
            steps = steps.clamp(number_format.qmin, number_format.qmax)
            gap = spacing(steps, number_format)
        self.register_buffer("gap", gap)
        self.register_buffer("floor", (steps / self.gap).floor() * self.gap)
        self.v = nn.Parameter(inverse_rectified_sigmoid((steps - self.floor) / self.gap))

    def h(self) -> Tensor:
        """The share of the way up that each weight takes, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def _codes(self, up: Tensor) -> Tensor:
        codes = self.floor + up * self.gap + self.zero_point
        return codes.clamp(self.format.qmin, self.format.qmax)

    def forward(self) -> Tensor:
        """The soft weight."""
        return (self._codes(self.h()) - self.zero_point) * self.scale

    def codes(self) -> Tensor:
        """The decided codes: up where ``h >= 0.5``."""
        return self._codes((self.v >= 0).to(self.floor.dtype)).to(code_type(self.format))


def default_rate(steps: int) -> float:
    """Adam's learning rate: the papers' 1e-3, raised where there are fewer steps, so that roundings settle."""
    return PAPER_LR * min(10.0, PAPER_STEPS / steps)


def undecided(layers: Iterable[QuantizedLayer]) -> list[tuple[WeightQuantizer, Tensor]]:
    """The weights, each with its quantizer, whose rounding nothing has decided yet."""
    return [pair for layer in layers for pair in layer.weight_pairs() if pair[0].codes is None]


def learn_rounding(
    problem: Problem,
    pairs: Sequence[tuple[WeightQuantizer, Tensor]],
    *,
    steps: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    weight: float,
    warmup: float,
) -> float:
    """Learn and decide the rounding of some weights together.

    The decision is kept only if rows that were not learned from agree that it beats rounding to nearest.

    Args:
        problem: computes the error that the weights lead to.
        pairs: the weights with their quantizers.
        steps: of the optimiser.
        batch: rows per step.
        lr: Adam's learning rate.
        generator: chooses the rows.
        weight: lambda, the weight of the regulariser.
        warmup: share of the steps without it.

    Returns:
        Held-out error as a share of that of rounding to nearest; 1 if that was kept.
    """
    nearest = problem.judged(p=2)
    learned = []
    for quantizer, part in pairs:
        rounding = SoftRounding(part, quantizer.scale, quantizer.zero_point, quantizer.format)
        quantizer.rounding = rounding
        learned.append(rounding)

    def penalty(step: int) -> Tensor | None:
        beta = annealed_beta(step, steps, warmup)
        if beta is None:
            return None
        return weight * torch.stack([regularizer(rounding.h(), beta) for rounding in learned]).sum()

    optimize(problem, [rounding.v for rounding in learned], steps, batch, lr, generator, 2, penalty)
    for (quantizer, _), rounding in zip(pairs, learned, strict=True):
        quantizer.codes, quantizer.rounding = rounding.codes(), None
    reached = problem.judged(p=2)
    if reached > nearest:
        for quantizer, part in pairs:
            quantizer.codes = quantizer.nearest(part)
        return 1.0
    return reached / nearest if nearest else 1.0
