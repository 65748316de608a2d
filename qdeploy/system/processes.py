"""Processes that a launcher such as torchrun started together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=6)  # for a process that is late: units differ, and so do machines


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes results."""
    return process_rank() == 0


def process_rank() -> int:
    """The number of this process among those that were started together."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def working_together(device: str) -> Iterator[None]:
    """Within, all processes do the same steps, and exchange what they found; all of them have to be here.

    Args:
        device: torch device of this process.
    """
    import torch

    # Its functions keep the group that exists when they are imported, as optimizers do on their first step; a group
    # that outlives `destroy_process_group` still has threads when Python ends, which may abort the process.
    import torch.distributed.nn.functional

    backend = "nccl" if device.startswith("cuda") and torch.distributed.is_nccl_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
        torch.distributed.barrier()  # none leaves while another still waits for what it sent
    finally:
        torch.distributed.destroy_process_group()


def are_together() -> bool:
    """Whether this runs within `working_together`."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leads() -> bool:
    """Whether this process does what one alone does of those that work together; any that works alone does."""
    return is_main_process() or not are_together()


def own_share() -> slice:
    """Which of some rows are this process's: every N-th where N processes work together, else all."""
    return slice(process_rank(), None, process_count()) if are_together() else slice(None)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Sum tensors of equal shapes over the processes that work together, in place."""
    import torch

    if not are_together() or not tensors:
        return
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(joined)
    for tensor, total in zip(tensors, joined.split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def of_the_first(value: _T) -> _T:
    """What the first process has, for those that work together; else the value itself."""
    import torch

    if not are_together():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]
