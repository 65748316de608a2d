"""The training loop of tuning: Adam on rows drawn at random, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.calibrate.reconstruct import add_up_gradients
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.tuning import Tuning
from qdeploy.system.processes import own_share
from qdeploy.system.progress import track

SAVE_SECONDS = 60.0  # a stop loses about this much


def journal_of(stage: str) -> str:
    """Under which name a draft keeps how far the learning of a stage has come."""
    return f"{stage}-learning"


def learn(
    session: Session,
    tuning: Tuning,
    loss: Callable[[Sequence[int]], Tensor],
    rows: Sequence[int],
    *,
    steps: int,
    lr: float,
    lr_scales: float,
    micro_batch: int,
) -> None:
    """Adam with a cosine, on rows drawn at random; an interrupted run continues.

    Args:
        session: the calibration.
        tuning: what is learned; installed.
        loss: mean over rows.
        rows: to learn from.
        steps: optimiser steps.
        lr: learning rate of weights and biases, in steps of their channels.
        lr_scales: learning rate of the logarithms of scales.
        micro_batch: rows whose activations are held at a time; gradients of a batch are added up.
    """
    named = tuning.parameters()
    logs = {id(log) for log in tuning.logs.values()}
    groups = [
        {"params": [p for p in named.values() if (id(p) in logs) is scales], "lr": rate}
        for scales, rate in ((False, lr), (True, lr_scales))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.Adam(groups)
    schedule = [(group, cast(float, group["lr"])) for group in optimizer.param_groups]
    journal = journal_of(session.stage)
    done = _restore(optimizer, named, session.draft.saved(journal))
    saved = time.monotonic()
    for step in track(list(range(done, steps)), session.stage):
        for group, rate in schedule:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        generator = session.generator(session.stage, "step", str(step))
        size = min(session.effort.batch, len(rows))
        chosen = [rows[i] for i in torch.randint(len(rows), (size,), generator=generator).tolist()]
        optimizer.zero_grad(set_to_none=True)
        own = chosen[own_share()]
        for start in range(0, len(own), micro_batch):
            part = own[start : start + micro_batch]
            (loss(part) * (len(part) / size)).backward()
        add_up_gradients(list(named.values()))
        optimizer.step()
        if time.monotonic() - saved >= SAVE_SECONDS and step + 1 < steps:
            session.draft.save(journal, _snapshot(optimizer, named, step + 1))
            saved = time.monotonic()


def _snapshot(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], done: int
) -> dict[str, Tensor]:
    kept = {"done": torch.tensor(done)}
    for name, parameter in named.items():
        kept[f"{name}.value"] = parameter.detach().cpu().clone()
        for key, value in optimizer.state[parameter].items():
            kept[f"{name}.{key}"] = value.detach().cpu().clone()
    return kept


def _restore(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor] | None,
) -> int:
    """Put a snapshot back; returns how many steps had been done."""
    if kept is None:
        return 0
    for name, parameter in named.items():
        with torch.no_grad():
            parameter.copy_(kept[f"{name}.value"])
        state = {key: kept[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq") if f"{name}.{key}" in kept}
        if state:
            moved = {key: value.to(parameter.device) for key, value in state.items()}
            optimizer.state[parameter] = {"step": kept[f"{name}.step"], **moved}
    return int(kept["done"])
