"""AdaRound: learned rounding of weights (Nagel et al., ICML 2020, arXiv 2004.10568).

Symbols as in the paper: each weight becomes ``s * (clamp(floor(w / s) + h(V) + z) - z)`` with the rectified
sigmoid ``h`` in [0, 1]; a regulariser pushes every h to 0 or 1; at the end the decision is made hard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qdeploy.calibrate.early_stop import EarlyStop
from qdeploy.calibrate.reconstruct import Problem, optimize
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.operators import code_type, over_weight, spacing
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.recipe.formats import Format

ZETA, GAMMA = 1.1, -0.1
NEAR = 0.2  # how far from a decided code its weight begins, in gaps
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
        codes: [C, ...] integers decided before: each weight then chooses between its code and the next one towards
            it, and begins near its code.
    """

    floor: Tensor
    gap: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        number_format: Format,
        codes: Tensor | None = None,
    ) -> None:
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
        floor = (steps / self.gap).floor() * self.gap
        if codes is None:
            share = (steps - floor) / self.gap
        else:
            decided = codes.to(weight.dtype) - self.zero_point
            up = decided > steps
            floor = torch.where(up, decided - self.gap, decided)
            share = torch.where(up, 1 - NEAR, NEAR).to(weight.dtype)
        self.register_buffer("floor", floor)
        self.v = nn.Parameter(inverse_rectified_sigmoid(share))

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
    settle: float | None = None,
) -> float:
    """Learn and decide the rounding of some weights together.

    The decision is kept only if rows that were not learned from agree that it beats what was there: rounding to
    nearest, or the codes that are decided already.

    Args:
        problem: computes the error that the weights lead to.
        pairs: the weights with their quantizers.
        steps: of the optimiser.
        batch: rows per step.
        lr: Adam's learning rate.
        generator: chooses the rows.
        weight: lambda, the weight of the regulariser.
        warmup: share of the steps without it.
        settle: stop once the held-out error of the roundings, decided as they are, has not fallen by this share in
            two tenths of the steps, and keep the best of them; None takes all steps, and the last.

    Returns:
        Held-out error as a share of that of what was there; 1 if that was kept.
    """
    before = problem.judged(p=2)
    kept = [quantizer.codes for quantizer, _ in pairs]
    learned = []
    for (quantizer, part), codes in zip(pairs, kept, strict=True):
        start = None if quantizer.format.floating else codes
        rounding = SoftRounding(part, quantizer.scale, quantizer.zero_point, quantizer.format, start)
        quantizer.rounding = rounding
        learned.append(rounding)

    def penalty(step: int) -> Tensor | None:
        beta = annealed_beta(step, steps, warmup)
        if beta is None:
            return None
        return weight * torch.stack([regularizer(rounding.h(), beta) for rounding in learned]).sum()

    def decide(codes: Sequence[Tensor]) -> float:
        """Held-out error of decided codes, which stay."""
        for (quantizer, _), own in zip(pairs, codes, strict=True):
            quantizer.codes, quantizer.rounding = own, None
        return problem.judged(p=2)

    def judge() -> tuple[float, list[Tensor]]:
        codes = [rounding.codes() for rounding in learned]
        error = decide(codes)
        for (quantizer, _), rounding in zip(pairs, learned, strict=True):
            quantizer.rounding = rounding
        return error, codes

    parameters = [rounding.v for rounding in learned]
    if settle is None:
        optimize(problem, parameters, steps, batch, lr, generator, 2, penalty)
        reached = decide([rounding.codes() for rounding in learned])
    else:
        stop = EarlyStop(judge, settle, max(1, steps // 10), round(warmup * steps))
        optimize(problem, parameters, steps, batch, lr, generator, 2, penalty, stop=stop)
        reached = decide(stop.best or judge()[1])
    if reached > before:
        for (quantizer, part), codes in zip(pairs, kept, strict=True):
            quantizer.codes = quantizer.nearest(part) if codes is None else codes
        return 1.0
    return reached / before if before else 1.0
