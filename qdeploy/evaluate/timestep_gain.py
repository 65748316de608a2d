"""Which tensors gain from scales of their own for each group of timesteps, and how much.

The rounding noise of a quantizer grows with the square of its step, and so of the span that its codes cover:
the model by which `qdeploy.calibrate.timestep_groups.best_cuts` chooses the groups. One scale for all
timesteps has to cover what any group covers. The gain is the ratio of the two noises in dB,

    10 log10 ( sum_t S^2 / sum_t s[t]^2 ),

S the span that covers all groups, s[t] that of the group of timestep t. It is the expected gain in rounding
noise; the gain in the prediction is measured by `qdeploy check --before`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qdeploy.quant.time_ranges import read_ranges, tensor_names
from qdeploy.recipe.formats import Format, parse_format
from qdeploy.store.artifact import Checkpoint
from qdeploy.store.tensors import open_tensors
from qdeploy.system.decibels import decibels


def gain_db(bank: Mapping[str, Tensor], timesteps: Tensor, number_format: Format) -> float:
    """The gain of one tensor.

    Args:
        bank: ``scale`` [K], ``zero_point`` [K] and ``edges`` [K - 1], as a checkpoint holds them.
        timesteps: [T] those that were calibrated.
        number_format: of the codes.
    """
    scale, zero_point = bank["scale"].double(), bank["zero_point"].double()
    low, high = (number_format.qmin - zero_point) * scale, (number_format.qmax - zero_point) * scale
    group = torch.bucketize(timesteps, bank["edges"])
    one = (high.max() - low.min()).square() * len(timesteps)
    several = (high - low)[group].square().sum()
    return decibels(float(one), float(several))


def timestep_gain(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The gain of every quantized tensor of a checkpoint.

    Returns:
        ``groups``, how many there are; ``median_db``; and ``by_tensor_db``, best first. None if the checkpoint
        has one scale for all timesteps, or its ranges were not kept.
    """
    ranges = read_ranges(checkpoint) if checkpoint.facts.timestep_scales else None
    number_format = parse_format(checkpoint.facts.activations)
    if ranges is None or number_format is None:
        return None
    gains: dict[str, float] = {}
    groups = 1
    with open_tensors(checkpoint.quantized) as stored:
        names = set(stored.keys())
        for name in tensor_names(ranges):
            if f"{name}.edges" in names:
                bank = {
                    part: stored.get_tensor(f"{name}.{part}") for part in ("scale", "zero_point", "edges")
                }
                gains[name] = round(gain_db(bank, ranges["timesteps"], number_format), 2)
                groups = max(groups, len(bank["scale"]))
    if not gains:
        return None
    ordered = dict(sorted(gains.items(), key=lambda entry: -entry[1]))
    return {"groups": groups, "median_db": round(median(gains.values()), 2), "by_tensor_db": ordered}
