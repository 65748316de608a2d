"""Which correction of mean errors is asked for, and the denoiser with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from qdeploy.sampling.correction import EVERY, GUARD, Corrected, OnlineCorrection, TableCorrection
from qdeploy.store.artifact import DenoiserArtifact
from qdeploy.store.correction_table import check_prediction, read_correction
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown

CORRECTIONS = ("none", "table", "online")


@dataclass(frozen=True)
class CorrectionChoice:
    """What was asked for.

    Attributes:
        kind: one of `CORRECTIONS`.
        every: of ``online``: calls of the denoiser between estimates.
        guard: of ``online``: standard deviations below which an estimate is taken for chance.
    """

    kind: str
    every: int = EVERY
    guard: float = GUARD


def read_choice(name: str) -> CorrectionChoice:
    """A choice from text: ``none``, ``table``, ``online``, ``online:4`` or ``online:4,2.5``.

    Raises:
        UsageError: it is none of these.
    """
    kind, colon, numbers = name.partition(":")
    if kind not in CORRECTIONS:
        raise UsageError(unknown("correction", name, CORRECTIONS))
    if not colon:
        return CorrectionChoice(kind)
    every, _, guard = numbers.partition(",")
    try:
        found = CorrectionChoice(kind, int(every), float(guard) if guard else GUARD)
    except ValueError:
        found = CorrectionChoice("")
    if found.kind != "online" or found.every < 1 or not 0 <= found.guard < math.inf:
        raise UsageError(
            f"the correction {name!r} cannot be read: write online:EVERY or online:EVERY,GUARD, as in online:4,3"
        )
    return found


def check_correction(name: str, artifact: DenoiserArtifact | None) -> None:
    """Refuse a correction that is not possible, before any work.

    Args:
        name: see `read_choice`.
        artifact: whose predictions are to be corrected; None for a model in full precision.

    Raises:
        UsageError: an unknown name, or there is no table.
        InvalidInputError: the table is that of another checkpoint.
    """
    if read_choice(name).kind == "table":
        if artifact is None:
            raise UsageError("a model in full precision has no correction table: choose --correction none")
        read_correction(artifact)


def correct(denoiser: nn.Module, name: str, artifact: DenoiserArtifact | None, scheduler: Any) -> nn.Module:
    """A denoiser with a correction of its mean errors (QNCD), for any stock pipeline; itself for ``none``.

        pipe.unet = qdeploy.correct(engine.as_denoiser(), "online:4", None, pipe.scheduler)

    Args:
        denoiser: of the artifact or model.
        name: see `read_choice`: ``table``, ``online``, ``online:EVERY`` or ``online:EVERY,GUARD``.
        artifact: holds the table; None for a correction that needs none.
        scheduler: the one that the denoiser will be used with.

    Raises:
        UsageError: as `check_correction`.
        InvalidInputError: the scheduler takes predictions for something else.
    """
    check_correction(name, artifact)
    choice = read_choice(name)
    if choice.kind == "online":
        return cast(nn.Module, Corrected(denoiser, OnlineCorrection(scheduler, choice.every, choice.guard)))
    if choice.kind == "none":
        return denoiser
    assert artifact is not None
    table = read_correction(artifact)
    check_prediction(table, scheduler, str(artifact.path))
    return cast(nn.Module, Corrected(denoiser, TableCorrection(table)))
