"""Diffusers' schedulers by short names."""

from __future__ import annotations

from typing import Any

from qdeploy.errors import InvalidInputError, UsageError

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


def make_scheduler(name: str | None, current: Any) -> Any:
    """A scheduler with the noise schedule of ``current``.

    Args:
        name: a short name, the name of any diffusers scheduler class, or None for ``current`` itself.
        current: the scheduler that the model came with.

    Raises:
        UsageError: diffusers has no scheduler of that name.
        InvalidInputError: the scheduler cannot take over this model's configuration.
    """
    if name is None:
        return current
    import diffusers

    found = getattr(diffusers, SHORT_NAMES.get(name, name), None)
    if found is None or not hasattr(found, "set_timesteps"):
        raise UsageError(
            f"unknown scheduler {name!r}: choose from {', '.join(SHORT_NAMES)}, or name a diffusers class"
        )
    try:
        return found.from_config(current.config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InvalidInputError(f"the scheduler {name} cannot take over this model's schedule: {error}") from error
