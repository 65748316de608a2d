"""The timesteps that a network can be called with, from those of its scheduler.

Schedulers of noise schedules number their timesteps from 0 to those of training, and the network is given these very
numbers. Flows are given ``t / 1000``, EDM ``log(sigma) / 4``, consistency models ``250 log(sigma)``. One trajectory
shows which: the network's t against the scheduler's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from qdeploy.store.facts import RangeFacts

_EXACT = 1e-4  # relative to the range


def timestep_range(scheduler: Any, met: Sequence[float]) -> RangeFacts | None:
    """The range of a network's timesteps, and how they follow from the scheduler's.

    Args:
        scheduler: a diffusers scheduler, set to the trajectory that was watched.
        met: the network's timestep in each step of it.

    Returns:
        None where the network is called with training's whole numbers.
    """
    own = torch.as_tensor(scheduler.timesteps).double().flatten()[-len(met) :]
    seen = torch.tensor(met, dtype=torch.float64)
    trained = scheduler.config.get("num_train_timesteps")
    flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
    same = len(own) == len(seen) and bool((own - seen).abs().max() <= 1e-3)
    whole = (
        not flow and isinstance(trained, int) and float(seen.min()) >= 0 and float(seen.max()) <= trained - 1
    )
    if whole and (same or len(own) != len(seen)):
        return None
    fit = _line(own, seen)
    limits = [float(seen.min()), float(seen.max())]
    if fit is not None:
        limits += [fit[0] * t + fit[1] for t in _extremes(scheduler)]
    slope, offset = fit or (None, None)
    return RangeFacts(low=min(limits), high=max(limits), slope=slope, offset=offset)


def _line(own: torch.Tensor, seen: torch.Tensor) -> tuple[float, float] | None:
    """Slope and offset of ``seen = slope * own + offset``; None if it is no such line."""
    if len(own) != len(seen) or len(own.unique()) < 2:
        return None
    slope, offset = numpy.polyfit(own.numpy(), seen.numpy(), 1)
    error = (slope * own + offset - seen).abs().max()
    span = max(float(seen.max() - seen.min()), 1e-12)
    return (float(slope), float(offset)) if float(error) <= _EXACT * span else None


def _extremes(scheduler: Any) -> list[float]:
    """The smallest and the largest timestep of the scheduler, over short and long trajectories."""
    found: list[float] = []
    for steps in (1, 2, 10, int(scheduler.config.get("num_train_timesteps") or 1000)):
        other = copy.deepcopy(scheduler)
        other.__dict__.pop("step", None)
        try:
            other.set_timesteps(steps)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError):
            continue  # some need the image's size as well
        found += [float(other.timesteps.min()), float(other.timesteps.max())]
    if "FlowMatch" in type(scheduler).__name__:
        found += [0.0, float(scheduler.config.get("num_train_timesteps") or 1000)]
    return found
