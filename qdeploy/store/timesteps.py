"""Which timesteps an artifact serves, and whether a schedule keeps to them."""

from __future__ import annotations

from collections.abc import Iterable

from qdeploy.store.facts import DenoiserFacts, TimestepFacts, TimeTableFacts
from qdeploy.system.errors import InvalidInputError

_DIGITS = 1e-6  # timesteps are float32: closer than this share of their range, two are one


def near(limits: TimestepFacts | None, table: TimeTableFacts | None = None) -> float:
    """Timesteps of an artifact that are closer than this are one."""
    known = [] if limits is None else [*limits.calibrated, limits.low or 0, limits.high or 0]
    known += (table.rows or []) if table is not None else []
    return _DIGITS * max((abs(t) for t in known), default=1000.0)


def on_grid(limits: TimestepFacts | None) -> bool:
    """Whether the network is called with the scheduler's own timesteps, whole numbers from 0 on."""
    return limits is None or limits.range is None


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
    same = near(limits, table)
    if limits is not None and limits.low is not None and limits.high is not None:
        low, high = limits.low, limits.high
        if not low - same <= timestep <= high + same:
            raise InvalidInputError(
                f"{where} was calibrated for timesteps from {low:g} to {high:g}, not {timestep:g}"
            )
    whole = on_grid(limits) and abs(timestep - round(timestep)) <= same
    if table is not None:
        rows = table.rows
        if whole if rows is None else any(abs(row - timestep) <= same for row in rows):
            return
        raise InvalidInputError(
            f"the time table of {where} was made for {table.schedule or 'all whole timesteps'} and has no row for "
            f"timestep {timestep:g}: export with --table-rows SCHEDULER:STEPS for another schedule, or with "
            "--time-table none for any"
        )
    calibrated = [] if limits is None or not limits.exact or whole else limits.calibrated
    if calibrated and not any(abs(t - timestep) <= same for t in calibrated):
        raise InvalidInputError(
            f"{where} stores features of the timestep for those it was calibrated at, and {timestep:g} is none of "
            "them: sample with the schedule of its calibration set, or calibrate for this one"
        )


def explain_schedule(facts: DenoiserFacts, timesteps: Iterable[float]) -> str | None:
    """One line on which scales a schedule will meet; None where scales do not depend on the timestep.

    Args:
        facts: the artifact's.
        timesteps: the scheduler's.
    """
    if facts.timesteps is None or not facts.timesteps.calibrated or not facts.timestep_scales:
        return None
    calibrated, span, same = facts.timesteps.calibrated, facts.timesteps.range, near(facts.timesteps)
    slope, offset = (1.0, 0.0) if span is None else (span.slope, span.offset)
    if slope is None or offset is None:
        return None
    asked = sorted({slope * float(t) + offset for t in timesteps})
    gaps = {t: min(abs(t - known) for known in calibrated) for t in asked}
    exact = sum(gap <= same for gap in gaps.values())
    line = f"{exact} of {len(asked)} timesteps were calibrated exactly"
    if exact == len(asked):
        return line
    furthest = max(gaps, key=lambda t: gaps[t])
    return f"{line}, the others take the group of the nearest; the furthest is {furthest:g}, {gaps[furthest]:g} away"
