"""Unit-by-unit reconstruction: each unit learns to compute, from quantized inputs, full-precision outputs.

BRECQ (Li et al., ICLR 2021) as Q-Diffusion uses it (section 3.3.1). Units come in execution order, so the
inputs of a unit have passed through units that are done. A unit is a whole block, attention included: its
attention maps are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qdeploy.calibrate.precision import products_in
from qdeploy.calibrate.record_units import UnitRun
from qdeploy.calibrate.recorded_rows import RecordedRows, to_device
from qdeploy.system.processes import add_up, are_together, leads, of_the_first, own_share


def output_error(output: Any, target: Any, p: float) -> Tensor:
    """``|y - y_hat|**p``, summed over features and averaged over everything else.

    Features are the channels of [B, C, H, W] and the last axis of anything else, so that the weight of
    this term does not depend on whether a unit works on images or on tokens.
    """
    total = torch.zeros(())
    for y_hat, y in zip(tree_flatten(output)[0], tree_flatten(target)[0], strict=True):
        if not isinstance(y, Tensor) or not y.is_floating_point():
            continue
        features = 1 if y.ndim == 4 else -1
        total = total.to(y.device) + (y_hat - y).abs().pow(p).sum(features).mean()
    return total


class Problem(Protocol):
    """What an optimiser needs to know of its objective.

    Attributes:
        learn: numbers of the rows to learn from.
    """

    learn: Tensor

    def error(self, rows: Tensor, p: float) -> Tensor:
        """The error on some rows, with gradient."""

    def judged(self, p: float) -> float:
        """Mean error on the rows that nothing is learned from."""


@dataclass
class UnitProblem:
    """A unit with recorded inputs, and its targets: rows to learn from, and rows to judge by."""

    run: UnitRun
    targets: RecordedRows
    learn: Tensor
    judge: Tensor

    def error(self, rows: Tensor, p: float) -> Tensor:
        """`output_error` of the unit on some rows."""
        return output_error(self.run(rows), to_device(self.targets.batch(rows), self.run.device), p)

    def judged(self, p: float, batch: int = 32) -> float:
        """Mean error on the rows that nothing was learned from, in float32."""
        with torch.no_grad(), products_in(None, self.run.device):
            errors = [self.error(rows, p) * len(rows) for rows in self.judge.split(batch)]
        return float(torch.stack(errors).sum() / len(self.judge))


def optimize(
    problem: Problem,
    parameters: Sequence[nn.Parameter],
    iterations: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    p: float,
    penalty: Callable[[int], Tensor | None] = lambda iteration: None,
    cosine: bool = False,
    stop: Callable[[int], bool] = lambda iteration: False,
) -> None:
    """Adam on ``parameters`` against the unit's output error plus a penalty.

    Args:
        problem: the unit with its data.
        parameters: what is learned.
        iterations: optimiser steps.
        batch: rows per step, drawn at random.
        lr: learning rate.
        generator: decides the rows.
        p: exponent of the output error.
        penalty: a further loss term for an iteration number (from 0).
        cosine: let the learning rate fall to 0 along a cosine; constant otherwise.
        stop: whether to stop after the step of an iteration number.

    Where processes work together (`qdeploy.system.processes`), each takes a share of a step's rows, and gradients are
    added up: the step is that of one process, but for rounding.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) if cosine else None
    for iteration in range(iterations):
        chosen = torch.randint(len(problem.learn), (min(batch, len(problem.learn)),), generator=generator)
        own = chosen[own_share()]
        loss = problem.error(problem.learn[own], p) * (len(own) / len(chosen))
        extra = penalty(iteration)
        if extra is not None and leads():
            loss = loss + extra
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        add_up_gradients(parameters)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if of_the_first(stop(iteration)):
            return


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the processes that work together."""
    if not are_together():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
