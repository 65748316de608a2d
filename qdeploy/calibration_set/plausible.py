"""Whether the rows of a calibration set can come from a model's sampling trajectory.

Hashes say that a set is as it was written, not that what was written makes sense. One row of 1e30 spoils every
scale that is calibrated from it, and a timestep that no scheduler gives makes groups and tables of nothing. So every
row is compared with the others at its timestep, and timesteps with those of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdeploy.calibration_set.shards import Shard
from qdeploy.store.facts import RangeFacts
from qdeploy.system.errors import InvalidInputError

LARGEST = 1e6  # no input of a denoiser is larger: variance-exploding models begin at 1e3 to 1e4
_ALIKE = 100.0  # rows at one timestep differ by less in their largest magnitude
_APART = 1e4  # and so do rows at different ones
_FEW = 3  # rows at one timestep that tell what is usual there
_CHUNK = 2**20  # elements looked at in one go


def check_rows(shards: Sequence[Shard], where: str) -> None:
    """Refuse a set in which a row is out of all proportion to the others.

    Args:
        shards: of the set; their numbers are finite.
        where: the set, for the message.

    Raises:
        InvalidInputError: a row is; it is named, with its timestep, the largest number in it and what is usual.
    """
    timesteps = torch.cat([shard.tensor("input.timestep").double() for shard in shards])
    for full in sorted(shards[0].names):
        group, _, name = full.partition(".")
        if group not in ("input", "condition") or name == "timestep":
            continue
        if not shards[0].tensor(full).is_floating_point():  # numbers of classes and of tokens
            continue
        peaks = torch.cat([_by_row(shard, full, group) for shard in shards])
        usual = _usual(peaks, timesteps if group == "input" else None)
        worst = int((peaks / usual).argmax())
        if peaks[worst] > usual[worst] or peaks.max() > LARGEST:
            row = worst if peaks[worst] > usual[worst] else int(peaks.argmax())
            limit = min(float(usual[row]), LARGEST)
            raise InvalidInputError(
                f"row {row} of {where}, at timestep {float(timesteps[row]):g}, holds {float(peaks[row]):.3g} in "
                f"{name!r}, where the other rows suggest no more than {limit:.3g}: collect the set again"
            )


def check_timesteps(timesteps: Tensor, training: int | None, span: RangeFacts | None, where: str) -> None:
    """Refuse timesteps that the model's scheduler does not give.

    Args:
        timesteps: ``[rows]`` of the set.
        training: timesteps that the model was trained with, if that is known.
        span: those that the network can be called with, where they are not the scheduler's whole numbers.
        where: the set, for the message.

    Raises:
        InvalidInputError: one of them is outside.
    """
    values = timesteps.double()
    whole = bool((values == values.round()).all())
    if span is not None and not (whole and values.min() < 0):
        low, high = float(span.low), float(span.high)
    elif training is not None:
        low, high = 0.0, float(training)
    elif whole:
        low, high = 0.0, LARGEST
    else:
        return
    slack = 1e-6 * max(abs(low), abs(high))
    outside = (values < low - slack) | (values > high + slack)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise InvalidInputError(
            f"row {row} of {where} is at timestep {float(values[row]):g}, but the model is called with "
            f"{low:g} to {high:g}: is the set from another model?"
        )


def _usual(peaks: Tensor, timesteps: Tensor | None) -> Tensor:
    """[rows] the largest magnitude that is believed of each row."""
    believed = torch.full_like(peaks, _APART * float(_typical(peaks)))
    if timesteps is None:
        return believed
    for timestep in timesteps.unique():
        here = timesteps == timestep
        if int(here.sum()) >= _FEW:
            believed[here] = torch.minimum(believed[here], _ALIKE * _typical(peaks[here]).clamp(min=1e-30))
    return believed


def _typical(peaks: Tensor) -> Tensor:
    """The lower median of what is not zero: empty prompts may be."""
    some = peaks[peaks > 0]
    return some.median() if len(some) else torch.ones((), dtype=peaks.dtype)


def _by_row(shard: Shard, full: str, group: str) -> Tensor:
    """[rows] the largest magnitude in each row of an input, in float64."""
    tensor = shard.tensor(full)
    if not tensor.numel():
        return torch.zeros(shard.rows, dtype=torch.float64)
    rows = max(1, _CHUNK // tensor[0].numel())
    parts = tensor.reshape(len(tensor), -1).split(rows)
    peaks = torch.cat([part.double().abs().amax(1) for part in parts])
    return peaks[shard.tensor("condition_row")] if group == "condition" else peaks
