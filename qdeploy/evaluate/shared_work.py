"""Evaluation in parts: pairs of batches on disk, so that work resumes, and processes share it.

Every process makes its own batches (number modulo processes) and writes each to a file; when all are
there, every process reads all of them in order. What is measured is then the same, bit for bit, however many
processes there were and however often they were stopped. ``accelerate launch -m qdeploy.cli check ...`` starts
them, on CPUs ``torchrun --nproc_per_node 2 -m qdeploy.cli check ...``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from qdeploy.evaluate.paired_sample import Call, Pair
from qdeploy.store.files import write_tensors
from qdeploy.store.paths import cache_folder
from qdeploy.system.errors import CapabilityError

_PARTS = ("expected", "predicted", "expected_sample", "sample")


def processes() -> tuple[int, int]:
    """This process's number and how many there are, as launchers such as accelerate set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes results."""
    return processes()[0] == 0


def wait_for_everyone() -> None:
    """Wait until all processes have reached this point.

    Raises:
        CapabilityError: there are several, and accelerate is not installed.
    """
    if processes()[1] == 1:
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise CapabilityError("several processes need accelerate: pip install accelerate") from error
    PartialState(cpu=True).wait_for_everyone()


def journal(key: str) -> Path:
    """Where the parts of one evaluation are kept until it is done."""
    return cache_folder() / "evaluations" / key[:32]


def in_parts(folder: Path, batches: int, make: Callable[[int], Pair]) -> Iterator[Pair]:
    """All pairs in order; those that are not on disk yet are made first, by the process that they belong to.

    Args:
        folder: where they are kept; it is removed when all have been seen.
        batches: how many there are.
        make: the pair of a batch's number.
    """
    rank, world = processes()
    for number in range(rank, batches, world):
        file = folder / f"{number:06d}.safetensors"
        if not file.exists():
            pair = make(number)
            write_tensors(file, _to_tensors(pair))
    wait_for_everyone()
    for number in range(batches):
        yield _from_file(folder / f"{number:06d}.safetensors")
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def _to_tensors(pair: Pair) -> dict[str, Tensor]:
    import torch

    tensors = {"images": pair.images, "expected_images": pair.expected_images}
    for number, call in enumerate(pair.calls):
        tensors |= {f"{number:04d}.{part}": getattr(call, part) for part in _PARTS}
    # Tensors that share memory, or parts of larger ones, cannot be stored as they are.
    stored = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    stored["timesteps"] = torch.tensor([call.timestep for call in pair.calls], dtype=torch.float64)
    if pair.prompts is not None:
        words = "\0".join(pair.prompts).encode()
        stored["prompts"] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    return stored


def _from_file(file: Path) -> Pair:
    from safetensors.torch import load_file

    stored = load_file(file)
    calls = [
        Call(t, *(stored[f"{number:04d}.{part}"] for part in _PARTS))
        for number, t in enumerate(stored["timesteps"].tolist())
    ]
    words = stored.get("prompts")
    prompts = None if words is None else bytes(words.tolist()).decode().split("\0")
    return Pair(calls, stored["expected_images"], stored["images"], prompts)
