"""Making the parts of a job: in this process, beside others on the same plan, or by workers elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qdeploy.parts.folder import PartFolder
from qdeploy.parts.plan import Job
from qdeploy.system.errors import Planned, UsageError
from qdeploy.system.progress import track

HERE, RAY, PLAN_ALONE = "here", "ray", "plan"
_FAILURES = 3  # in a row, of storage that comes and goes
_POLL = 0.2  # seconds between two looks at parts that other processes are making


@contextmanager
def made(
    job: Job, on: str = HERE, workers: int | None = None, worker_cpus: float = 1.0
) -> Iterator[PartFolder]:
    """All parts of a job, while they are read; they are kept if that fails.

    Args:
        job: what to make.
        on: ``here``; ``ray`` for workers on this machine, ``ray://HOST:10001`` for those of a cluster; ``plan`` to
            write the plan and stop.
        workers: how many, on Ray; by default as many as its processors, or GPUs, allow.
        worker_cpus: processors for each.

    Raises:
        Planned: with ``plan``.
        UsageError: an unknown place, an impossible number, or inputs that other processes cannot open.
        CapabilityError: Ray is not installed or cannot be reached, or no space is left.
    """
    check_place(on, workers, worker_cpus)
    if on == PLAN_ALONE:
        raise Planned(job.write(), job.count)
    with job.parts() as parts:
        if on == HERE:
            if job.arguments is not None:
                job.write()
            make_parts(job, parts, range(job.count))
        else:
            from qdeploy.parts.ray_workers import make_on_ray

            job.write()
            make_on_ray(job, parts, on, workers, worker_cpus)
        yield parts


def check_place(on: str, workers: int | None, worker_cpus: float) -> None:
    """Refuse what cannot be, before any work.

    Raises:
        UsageError: it cannot.
    """
    remote = on == RAY or on.startswith("ray://")
    if not remote and on not in (HERE, PLAN_ALONE):
        raise UsageError(f"work is done on here, ray, ray://HOST:PORT or plan, not {on!r}")
    if not remote and (workers is not None or worker_cpus != 1):
        raise UsageError("workers are those of Ray: pass --on ray or --on ray://HOST:PORT too")
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if not worker_cpus > 0:
        raise UsageError(f"a worker takes a positive number of processors, not {worker_cpus}")


def make_parts(job: Job, parts: PartFolder, numbers: Sequence[int], wait: bool = True) -> None:
    """Make those parts that nobody has made yet; processes with the same plan share them.

    Args:
        job: what makes them.
        parts: where they are kept.
        numbers: of the parts.
        wait: stay until those are there, too, that other processes are making.
    """
    left = [number for number in numbers if not parts.has(number)]
    bar = iter(range(len(left)) if job.shows_progress else track(range(len(left)), job.label))
    failed = 0
    while left:
        idle = True
        for number in left:
            try:
                made_here = _made_alone(job, parts, number)
            except Exception as error:
                if (failed := failed + 1) > _FAILURES:
                    raise
                parts.wait_for_storage(error)
                continue
            if made_here:
                next(bar, None)
                failed, idle = 0, False
        left = [number for number in left if not parts.has(number)]
        if idle and not wait and not failed:
            break
        if idle and left:
            time.sleep(_POLL)
    for _ in bar:
        pass


def _made_alone(job: Job, parts: PartFolder, number: int) -> bool:
    """Whether the part was made here: it was neither there, nor in the hands of another process."""
    if parts.has(number) or (claim := parts.claim(number)) is None:
        return False
    with claim:
        if not parts.has(number):
            parts.keep(number, job.make)
    return True
