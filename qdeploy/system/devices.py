"""Torch devices by name: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, ``xpu``."""

from __future__ import annotations

import os

from qdeploy.system.errors import CapabilityError


def kind_of(device: str) -> str:
    """``cuda`` of ``cuda:1``: what of a device determines results."""
    return device.partition(":")[0]


def own_device(device: str) -> str:
    """The device of this process: ``cuda`` is a GPU each where a launcher such as torchrun starts several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        CapabilityError: it cannot.
    """
    import torch

    try:
        torch.empty(1, device=own_device(device))
    except (RuntimeError, AssertionError) as error:
        raise CapabilityError(
            f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
