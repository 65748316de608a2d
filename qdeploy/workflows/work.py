"""The verb ``work``: parts of a plan in this process, as jobs of Slurm or Kubernetes make them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy.parts.plan import call, find_plan, open_job, read_plan
from qdeploy.parts.run import make_parts
from qdeploy.system.errors import InvalidInputError, UsageError


@dataclass(frozen=True)
class WorkResult:
    """What became of a plan.

    Attributes:
        plan: its folder.
        parts: how many it has.
        made: how many are there now.
        result: what the verb returned, after ``finish``.
    """

    plan: Path
    parts: int
    made: int
    result: Any = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "plan": str(self.plan), "result": None}


def work(plan: str | Path, *, part: str | None = None, finish: bool = False) -> WorkResult:
    """Make parts of a plan that another process has written with ``on="plan"``.

    Parts that are there are not made again, and processes that work on one plan at the same time share its parts, so
    that a job may be run twice, or stopped and queued again.

    Args:
        plan: its folder, or the path of the artifact that it is for.
        part: ``K/N``: of all parts every N-th from the K-th on, K from 1; all by default.
        finish: carry out the rest of the verb when all parts are there, and make none.

    Returns:
        How many parts are there; with ``finish`` also the verb's result.

    Raises:
        UsageError: an impossible share, or both a share and the finish.
        InvalidInputError: there is no plan, another version wrote it, its inputs are others here; or with ``finish``
            parts are missing.
    """
    folder = find_plan(plan)
    if finish:
        if part is not None:
            raise UsageError("--part makes parts and --finish makes none: give one of them")
        return _finish(folder)
    first, step = (1, 1) if part is None else _share(part)
    job = open_job(folder)
    with job.parts() as parts:
        make_parts(job, parts, range(first - 1, job.count, step), wait=part is None)
        made = job.count - len(parts.missing())
    return WorkResult(folder, job.count, made)


def _finish(folder: Path) -> WorkResult:
    described = read_plan(folder)
    count = int(described["count"])
    there = [(folder / "parts" / f"{number:06d}" / "part.json").is_file() for number in range(count)]
    if not all(there):
        raise InvalidInputError(
            f"{there.count(False)} of {count} parts of {folder} are missing, the first is part {there.index(False)}: "
            "make them with `qdeploy work`"
        )
    return WorkResult(folder, count, count, call(folder))


def _share(part: str) -> tuple[int, int]:
    first, slash, count = part.partition("/")
    if slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count):
        return int(first), int(count)
    raise UsageError(f"a share of the parts is K/N with K from 1 to N, as in 3/8, not {part!r}")
