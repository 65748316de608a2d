"""The training loop of the zoo's models: seeded by step, and continued after any interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.system.machine import has_bf16

_WARM_UP, _COOL_DOWN = 0.02, 0.25
_LOG_EVERY, SAVE_EVERY = 100, 500


@dataclass(frozen=True)
class Draws:
    """All randomness of one step. It depends on the seed and the step alone, so nothing of it has to be saved."""

    step: int
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Draws:
        """The randomness of a step."""
        states = np.random.SeedSequence((seed, step)).generate_state(2, np.uint64)
        return cls(step, np.random.default_rng(states[0]), torch.Generator().manual_seed(int(states[1] >> 1)))


def bf16_where_fast(device: str) -> AbstractContextManager[Any]:
    """Autocast to bf16, but on processors without bf16 products, where that is many times slower than f32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or has_bf16())


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a linear rise, level ground, a linear fall over the last quarter."""
    done = step / steps
    return max(1e-3, min(1.0, done / _WARM_UP, (1 - done) / _COOL_DOWN))


def fit(
    network: nn.Module,
    loss_of: Callable[[Draws], Tensor],
    *,
    name: str,
    folder: Path,
    steps: int,
    rate: float,
    seed: int = 0,
    decay: float = 0.0,
    averaged: Callable[[], None] | None = None,
) -> None:
    """Train with AdamW; the network ends with the moving average of its weights.

    A snapshot in ``folder`` is replaced atomically now and then, and removed by whoever has no more use
    for it (`forget`). With a snapshot of all steps at hand, nothing is trained.

    Args:
        network: what is trained, on its device.
        loss_of: the loss of one step's random batch.
        name: of the snapshot and in the log.
        folder: where the snapshot and ``training.log`` are.
        steps: how many in all.
        rate: learning rate on level ground.
        seed: with the step's number, decides the randomness of a step.
        decay: of the moving average.
        averaged: called after every snapshot, while the network holds the average.
    """
    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    snapshot, step, seconds = folder / f"{name}.snapshot", 0, 0.0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True, map_location=parameters[0].device)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, seconds = state["average"], state["step"], state["seconds"]
    total, logged, began = 0.0, step, time.perf_counter() - seconds
    while step < steps:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        loss = loss_of(Draws.of(seed, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            pull = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, list[Tensor](parameters), pull)
        total += loss.item()
        if step % _LOG_EVERY == 0 or step == steps:
            seconds = time.perf_counter() - began
            mean = total / (step - logged)
            write_log(
                folder, {"network": name, "step": step, "loss": round(mean, 5), "seconds": round(seconds, 1)}
            )
            total, logged = 0.0, step
        if step % SAVE_EVERY == 0 or step == steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            _replace(snapshot, {**state, "step": step, "seconds": time.perf_counter() - began})
            if averaged is not None and step < steps:
                _swap(parameters, average)
                averaged()
                _swap(parameters, average)
    _swap(parameters, average)


def forget(folder: Path) -> None:
    """Remove the snapshots of a training that is over."""
    for snapshot in folder.glob("*.snapshot"):
        snapshot.unlink()


def write_log(folder: Path, record: dict[str, Any]) -> None:
    """Print a record and append it to ``training.log``."""
    line = json.dumps(record)
    print(line, flush=True)
    with (folder / "training.log").open("a") as stream:
        stream.write(line + "\n")


def _swap(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)


def _replace(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
