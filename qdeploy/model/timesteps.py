"""Timesteps that are chosen one by one, and DDIM's share of noise, in any pipeline.

Pipelines ask their scheduler for a number of steps and offer no choice of timesteps, and some never pass
``eta`` on. So the scheduler is given both: it is of its own class, with another ``set_timesteps`` or ``step``.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qdeploy.system.errors import UsageError

QUAD = "quad"
Timesteps = str | Sequence[float]


def read_timesteps(given: Timesteps) -> tuple[float, ...] | str:
    """Descending timesteps from numbers or from text ``981,961,941``; ``quad`` stays a word.

    Raises:
        UsageError: they are no numbers, do not descend, or are repeated.
    """
    if isinstance(given, str) and given.strip() == QUAD:
        return QUAD
    try:
        numbers = tuple(float(word) for word in (given.split(",") if isinstance(given, str) else given))
    except (TypeError, ValueError) as error:
        raise UsageError(f"timesteps are 'quad' or numbers such as 981,961,941, not {given!r}") from error
    if not numbers or not all(map(math.isfinite, numbers)) or min(numbers) < 0:
        raise UsageError(f"timesteps are 'quad' or numbers from 0 on such as 981,961,941, not {given!r}")
    if any(a <= b for a, b in pairwise(numbers)):
        raise UsageError("timesteps must descend, each once, as sampling meets them: 981,961,...,1")
    return numbers


def quadratic(steps: int, trained: int) -> tuple[float, ...]:
    """The timesteps of DDIM's ``skip_type quad``: squares of evenly spaced roots up to that of 0.8 T.

    The original meets timesteps that coincide more than once, without any effect where ``eta`` is 0; here each is
    met once. 100 steps are 96 timesteps.

    Args:
        steps: of sampling.
        trained: timesteps of training, T.
    """
    import numpy as np

    values = np.linspace(0, np.sqrt(trained * 0.8), steps) ** 2
    return tuple(float(value) for value in sorted({int(value) for value in values}, reverse=True))


def with_timesteps(scheduler: Any, timesteps: tuple[float, ...] | str, steps: int) -> Any:
    """A scheduler that samples at these timesteps, whatever it is asked for.

    Args:
        scheduler: of diffusers.
        timesteps: of `read_timesteps`.
        steps: how many, for ``quad``.

    Raises:
        UsageError: the scheduler takes no choice of timesteps, or was not trained with one of them.
    """
    import diffusers

    parent = type(scheduler)
    trained = scheduler.config.get("num_train_timesteps", 1000)
    chosen = quadratic(steps, trained) if isinstance(timesteps, str) else timesteps
    if chosen[0] >= trained:
        raise UsageError(
            f"the model was trained with timesteps below {trained}, and {chosen[0]:g} is none of them"
        )
    choice = "timesteps" in inspect.signature(parent.set_timesteps).parameters
    if not choice and not isinstance(scheduler, diffusers.DDIMScheduler):
        raise UsageError(
            f"{parent.__name__} takes no choice of timesteps: choose --scheduler ddim, ddpm, dpm++, euler or heun"
        )
    if any(value != int(value) for value in chosen):
        raise UsageError("timesteps of this scheduler are whole numbers")
    whole = [int(value) for value in chosen]

    def set_timesteps(
        self: Any, num_inference_steps: Any = None, device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if choice:
            parent.set_timesteps(self, timesteps=whole, device=device)
            return
        import torch

        parent.set_timesteps(self, len(whole), device=device)
        self.timesteps = torch.tensor(whole, device=device)

    @functools.wraps(parent.step)
    def step(self: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        now = int(timestep)
        # DDIM's step goes on by T // steps, whatever its schedule: this divides to the way to the next timestep.
        self.num_inference_steps = _Steps(len(whole), now - max((t for t in whole if t < now), default=-1))
        return parent.step(self, model_output, timestep, *args, **kwargs)

    members: dict[str, Any] = {"set_timesteps": set_timesteps, "__module__": parent.__module__}
    if not choice:
        members["step"] = step
    made: Any = type(parent.__name__, (parent,), members)
    return made.from_config(scheduler.config)


class _Steps(int):
    """A number of steps; what is divided by it gives the distance to the next timestep."""

    distance: int

    def __new__(cls, steps: int, distance: int) -> _Steps:
        made = super().__new__(cls, steps)
        made.distance = distance
        return made

    def __rfloordiv__(self, other: int) -> int:
        return self.distance


def with_eta(scheduler: Any, eta: float) -> Any:
    """A scheduler whose every step has this ``eta``, also in pipelines that do not know the word.

    Raises:
        UsageError: its steps take none.
    """
    parent = type(scheduler)
    if "eta" not in inspect.signature(parent.step).parameters:
        raise UsageError(f"{parent.__name__} takes no eta")

    @functools.wraps(parent.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return parent.step(self, *args, **{**kwargs, "eta": eta})

    members = {"step": step, "own_eta": eta, "__module__": parent.__module__}
    made: Any = type(parent.__name__, (parent,), members)
    return made.from_config(scheduler.config)
