"""Diffusers' schedulers by short names."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from qdeploy.model.sampling import Sampling
from qdeploy.model.timesteps import with_eta, with_timesteps
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.suggest import unknown

SHORT_NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def scheduler_for(sampling: Sampling, current: Any) -> Any:
    """The scheduler that images are to be sampled with: its class, its timesteps and its ``eta``.

    Args:
        sampling: what is asked for.
        current: the scheduler that the model came with.

    Raises:
        UsageError: as `make_scheduler`; or it takes no choice of timesteps, or no eta.
        CapabilityError: as `make_scheduler`.
        InvalidInputError: as `make_scheduler`.
    """
    scheduler = make_scheduler(sampling.scheduler, current)
    if sampling.timesteps is not None:
        assert isinstance(sampling.timesteps, str | tuple)
        scheduler = with_timesteps(scheduler, sampling.timesteps, sampling.steps)
    return scheduler if sampling.eta is None else with_eta(scheduler, sampling.eta)


def make_scheduler(name: str | None, current: Any) -> Any:
    """A scheduler with the noise schedule of ``current``.

    Args:
        name: a short name, the name of any diffusers scheduler class, or None for ``current`` itself.
        current: the scheduler that the model came with.

    Raises:
        CapabilityError: a library that the scheduler needs is not installed.
        UsageError: diffusers has no scheduler of that name, or the model is a flow and the scheduler is none.
        InvalidInputError: the scheduler cannot take over this model's configuration.
    """
    if name is None:
        return current
    import diffusers

    found = getattr(diffusers, SHORT_NAMES.get(name, name), None)
    try:
        known = found is not None and hasattr(found, "set_timesteps")
    except ImportError as error:  # diffusers holds a stand-in for a scheduler whose library is missing
        raise CapabilityError(
            f"the scheduler {name} cannot be used: {' '.join(str(error).split())}"
        ) from error
    if found is None or not known:
        raise UsageError(unknown("scheduler", name, SHORT_NAMES, ", or name a diffusers class"))
    if _is_flow(type(current)) and not _is_flow(found):
        raise UsageError(
            f"{name} cannot replace {type(current).__name__}: the model is a flow; pass --scheduler "
            f"{type(current).__name__}, or scheduler=None in Python"
        )
    try:
        return _for_any_pipeline(found).from_config(current.config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InvalidInputError(
            f"the scheduler {name} cannot take over this model's schedule: {error}"
        ) from error


def _is_flow(scheduler: type) -> bool:
    """Whether a scheduler class is for flow matching, which knows no noise schedule that others could take over."""
    return "FlowMatch" in scheduler.__name__


def _for_any_pipeline(found: Any) -> Any:
    """A scheduler class with the interface that pipelines written for another one use, or an error that it lacks it.

    `DDPMPipeline`, for one, passes ``generator`` to every scheduler, even to those that take none. And it
    never scales its samples: with a scheduler that needs this, diffusers would sample garbage without a word.
    """
    accepted = inspect.signature(found.step).parameters

    @functools.wraps(found.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if float(getattr(self, "init_noise_sigma", 1)) != 1 and not getattr(self, "scaled", False):
            raise UsageError(
                f"this pipeline does not scale its samples as {found.__name__} needs it: choose ddim, ddpm, "
                "pndm, dpm++ or unipc"
            )
        return found.step(self, *args, **{name: value for name, value in kwargs.items() if name in accepted})

    members: dict[str, Any] = {"step": step, "__module__": found.__module__}
    if hasattr(found, "scale_model_input"):

        @functools.wraps(found.scale_model_input)
        def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.scaled = True
            return found.scale_model_input(self, *args, **kwargs)

        members["scale_model_input"] = scale_model_input
    return type(found.__name__, (found,), members)
