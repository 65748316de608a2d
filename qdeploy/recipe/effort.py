"""How much work a calibration does, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
        # the default: a quarter of the steps of `thorough`
        Effort("balanced", rows=1024, batch=32, rounding=500, scales=100, tuning=300),
        Effort("thorough", rows=1024, batch=32, rounding=2000, scales=500, tuning=1000),
        # Q-Diffusion's own numbers; QuEST reports 2200 steps on one model
        Effort("best", rows=5120, batch=32, rounding=20000, scales=5000, tuning=4000),
    )
}


def find_effort(name: str) -> Effort:
    """The effort of that name, or one with numbers of its own: ``fast,rows=5120,batch=8,rounding=20000``.

    Raises:
        UsageError: there is none, or a number is none that an effort has.
    """
    word, *given = (part.strip() for part in name.split(","))
    if word not in EFFORTS:
        raise UsageError(unknown("effort", word, EFFORTS))
    own = {each.name for each in fields(Effort)} - {"name"}
    numbers = {}
    for text in given:
        key, equals, value = text.partition("=")
        if key not in own:
            raise UsageError(unknown("number of an effort", key, sorted(own)))
        if not equals or not value.isdecimal() or int(value) < 1:
            raise UsageError(
                f"{key} of an effort is a whole number from 1 on, as in {word},{key}=32, not {text!r}"
            )
        numbers[key] = int(value)
    return replace(EFFORTS[word], name=name, **numbers) if numbers else EFFORTS[word]
