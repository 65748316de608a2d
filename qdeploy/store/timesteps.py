"""What an artifact says of timesteps, and whether a schedule keeps to it.

``facts["timesteps"]`` holds ``calibrated``, those that scales were found at, and ``low`` and ``high``, the
limits of training, where the model's scheduler tells them; ``facts["time_table"]`` holds the ``rows`` of a
table that was made for one schedule alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qdeploy.system.errors import InvalidInputError

_SAME = 1e-3  # timesteps closer than this are one


def check_timestep(facts: Mapping[str, Any], timestep: float, where: str) -> None:
    """Refuse a timestep that an artifact knows nothing of.

    Args:
        facts: the artifact's.
        timestep: what the network is called with.
        where: the artifact, for the message.

    Raises:
        InvalidInputError: it is outside of the range of training, or has no row in the time table.
    """
    limits = facts.get("timesteps") or {}
    if "low" in limits and not limits["low"] - _SAME <= timestep <= limits["high"] + _SAME:
        raise InvalidInputError(
            f"{where} was calibrated for timesteps from {limits['low']:g} to {limits['high']:g}, not {timestep:g}"
        )
    table = facts.get("time_table") or {}
    rows = table.get("rows")
    if rows and min(abs(row - timestep) for row in rows) > _SAME:
        raise InvalidInputError(
            f"the time table of {where} was made for the schedule {table['schedule']} and has no row for "
            f"timestep {timestep:g}: export with --table-rows all"
        )


def explain_schedule(facts: Mapping[str, Any], timesteps: Iterable[float]) -> str | None:
    """One line on which scales a schedule will meet; None where scales do not depend on the timestep."""
    calibrated = (facts.get("timesteps") or {}).get("calibrated")
    if not calibrated or not facts.get("timestep_scales"):
        return None
    asked = sorted(set(map(float, timesteps)))
    gaps = {t: min(abs(t - known) for known in calibrated) for t in asked}
    exact = sum(gap <= _SAME for gap in gaps.values())
    line = f"{exact} of {len(asked)} timesteps were calibrated exactly"
    if exact == len(asked):
        return line
    furthest = max(gaps, key=lambda t: gaps[t])
    return f"{line}, the others take the group of the nearest; the furthest is {furthest:g}, {gaps[furthest]:g} away"
