"""Clocks, temperature and memory of the GPU, by ``nvidia-smi``: a speed without them cannot be repeated."""

from __future__ import annotations

import subprocess

from qdeploy.system.errors import CapabilityError

# What is asked for, by the name it gets here. The unit is part of our names, and left out of the answer.
FIELDS = {
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "watts_limit": "power.limit",
    "used_mib": "memory.used",
    "busy_percent": "utilization.gpu",
}


def gpu_state(index: int = 0, program: str = "nvidia-smi") -> dict[str, float | None]:
    """The first GPU's state, now.

    Args:
        index: which GPU.
        program: the program to ask.

    Returns:
        Numbers by the names of `FIELDS`; None where the GPU does not report it.

    Raises:
        CapabilityError: the program is missing or fails.
    """
    query = f"--query-gpu={','.join(FIELDS.values())}"
    command = [program, f"--id={index}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CapabilityError(
            f"{program} cannot be asked for the GPU's clocks: is the driver installed?"
        ) from error
    values = done.stdout.strip().splitlines()[0].split(",") if done.stdout.strip() else []
    if len(values) != len(FIELDS):
        raise CapabilityError(f"{program} answers {done.stdout.strip()!r} instead of {len(FIELDS)} numbers")
    return {name: _number(value) for name, value in zip(FIELDS, values)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None
