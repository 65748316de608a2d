"""Bias correction: the mean error of a unit's output goes into the bias of its last layer.

Rounding moves the mean of what a unit computes, for all inputs alike. Such errors add up through the network to one
that is the same at every timestep, where other errors differ and partly cancel. In a bias, which stays in float,
their correction costs nothing (Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qdeploy.calibrate.reconstruct import UnitProblem
from qdeploy.quant.layer import QuantizedLayer


def correct_bias(problem: UnitProblem, layers: Sequence[QuantizedLayer], batch: int = 32) -> bool:
    """Correct the mean error of a unit's output, channel by channel, if rows that were not looked at agree.

    Args:
        problem: the unit, with its roundings decided.
        layers: its layers in the order of execution. The bias is that of the last one that has as many channels as
            the unit's output: what it computes is added to that, in blocks with residuals.
        batch: rows that run together.

    Returns:
        Whether a bias was changed. It is not where the unit has several outputs, or no such layer.
    """
    shift = _mean_error(problem, batch)
    if shift is None:
        return False
    fitting = [layer for layer in layers if layer.bias is not None and len(layer.bias) == len(shift)]
    if not fitting:
        return False
    layer, error = fitting[-1], problem.judged(p=2)
    before, bias = layer.tuned_bias, layer.bias
    assert bias is not None
    layer.tuned_bias = bias.detach() + shift.to(bias)
    if problem.judged(p=2) < error:
        return True
    layer.tuned_bias = before
    return False


def _mean_error(problem: UnitProblem, batch: int) -> Tensor | None:
    """[C] what is missing of each channel of the output, in the mean over the rows to learn from."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for rows in problem.learn.split(batch):
            outputs, targets = (
                [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
                for tree in (problem.run(rows), problem.targets.batch(rows))
            )
            if len(outputs) != 1 or outputs[0].ndim < 2:
                return None
            missing = targets[0].to(outputs[0].device) - outputs[0]
            features = missing.movedim(1 if missing.ndim == 4 else -1, -1).flatten(0, -2)
            total, count = total.to(features.device) + features.double().sum(0), count + len(features)
    return total / count
