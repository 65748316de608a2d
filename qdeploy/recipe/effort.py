"""How much work a calibration does, as data."""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class Effort:
    """An amount of work.

    Attributes:
        name: the word that recipes use.
        rows: calibration rows that reconstruction and range finding see, at most.
        batch: rows per optimiser step.
        rounding: AdaRound steps per unit.
        scales: steps per unit for learning activation scales.
        tuning: steps of the whole network for tuning weights.
    """

    name: str
    rows: int
    batch: int
    rounding: int
    scales: int
    tuning: int = 200


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("fast", rows=256, batch=16, rounding=300, scales=60, tuning=200),
        Effort("balanced", rows=1024, batch=32, rounding=2000, scales=500, tuning=1000),
        # Q-Diffusion's own numbers; QuEST reports 2200 steps on one model
        Effort("best", rows=5120, batch=32, rounding=20000, scales=5000, tuning=4000),
    )
}


def find_effort(name: str) -> Effort:
    """The effort of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in EFFORTS:
        raise UsageError(unknown("effort", name, EFFORTS))
    return EFFORTS[name]
