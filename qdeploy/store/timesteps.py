"""Which timesteps an artifact serves, and whether a schedule keeps to them."""

from __future__ import annotations

from collections.abc import Iterable

from qdeploy.store.facts import DenoiserFacts, TimestepFacts, TimeTableFacts
from qdeploy.system.errors import InvalidInputError

_SAME = 1e-3  # timesteps closer than this are one


def check_timestep(
    limits: TimestepFacts | None, table: TimeTableFacts | None, timestep: float, where: str
) -> None:
    """Refuse a timestep that an artifact has no scales or features for.

    Args:
        limits: the timesteps of the artifact, where it states them.
        table: its time table, if it has one.
        timestep: what the network is called with.
        where: the artifact, for the message.

    Raises:
        InvalidInputError: it is outside of the range of training, or has no row in the time table.
    """
    if limits is not None and limits.low is not None and limits.high is not None:
        low, high = limits.low, limits.high
        if not low - _SAME <= timestep <= high + _SAME:
            raise InvalidInputError(
                f"{where} was calibrated for timesteps from {low:g} to {high:g}, not {timestep:g}"
            )
    rows = table.rows if table is not None else None
    if table is not None and rows and min(abs(row - timestep) for row in rows) > _SAME:
        raise InvalidInputError(
            f"the time table of {where} was made for the schedule {table.schedule} and has no row for "
            f"timestep {timestep:g}: export with --table-rows all"
        )


def explain_schedule(facts: DenoiserFacts, timesteps: Iterable[float]) -> str | None:
    """One line on which scales a schedule will meet; None where scales do not depend on the timestep."""
    if facts.timesteps is None or not facts.timesteps.calibrated or not facts.timestep_scales:
        return None
    calibrated = facts.timesteps.calibrated
    asked = sorted(set(map(float, timesteps)))
    gaps = {t: min(abs(t - known) for known in calibrated) for t in asked}
    exact = sum(gap <= _SAME for gap in gaps.values())
    line = f"{exact} of {len(asked)} timesteps were calibrated exactly"
    if exact == len(asked):
        return line
    furthest = max(gaps, key=lambda t: gaps[t])
    return f"{line}, the others take the group of the nearest; the furthest is {furthest:g}, {gaps[furthest]:g} away"
