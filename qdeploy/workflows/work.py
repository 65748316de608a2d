"""The verb ``work``: parts of a plan in this process, as jobs of Slurm or Kubernetes make them.

The plan is a folder that all machines see, or an address of an object store.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy.parts.object_store import ObjectStore, is_address
from qdeploy.parts.packed import pack
from qdeploy.parts.plan import call, find_plan, open_job, read_plan
from qdeploy.parts.run import make_parts
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.progress import track


@dataclass(frozen=True)
class WorkResult:
    """What became of a plan.

    Attributes:
        plan: its folder or address.
        parts: how many it has.
        made: how many are there now.
        result: what the verb returned, after ``finish``.
    """

    plan: Path | str
    parts: int
    made: int
    result: Any = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "plan": str(self.plan), "result": None}


def work(
    plan: str | Path, *, part: str | None = None, finish: bool = False, publish: str | None = None
) -> WorkResult:
    """Make parts of a plan that another process has written with ``on="plan"``.

    Parts that are there are not made again, and processes that work on one plan at the same time share its parts, so
    that a job may be run twice, or stopped and queued again.

    Args:
        plan: its folder, the path of the artifact that it is for, or the address that it was published at.
        part: ``K/N``: of all parts every N-th from the K-th on, K from 1; all by default.
        finish: carry out the rest of the verb when all parts are there, and make none.
        publish: an address of an object store, such as ``s3://bucket/job``: copy the plan there, and make no parts.
            Machines that see no common disk then work on that address.

    Returns:
        How many parts are there; with ``finish`` also the verb's result.

    Raises:
        UsageError: an impossible share, more than one of ``part``, ``finish`` and ``publish``, or another plan is
            published at the address.
        InvalidInputError: there is no plan, another version wrote it, its inputs are others here; or with ``finish``
            parts are missing or damaged.
        CapabilityError: the object store cannot be used.
    """
    if sum((part is not None, finish, publish is not None)) > 1:
        raise UsageError("--part makes parts, --finish and --publish make none: give one of them")
    if publish is not None:
        return _publish(plan, publish)
    share = None if part is None else _share(part)
    if is_address(plan):
        store = ObjectStore(str(plan))
        return _finish_from(store) if finish else _work_at(store, share)
    folder = find_plan(plan)
    if finish:
        return _finish(folder)
    job = open_job(folder)
    with job.parts() as parts:
        make_parts(job, parts, _numbers(share, job.count), wait=share is None)
        made = job.count - len(parts.missing())
    return WorkResult(folder, job.count, made)


def _finish(folder: Path) -> WorkResult:
    count = int(read_plan(folder)["count"])
    there = {n for n in range(count) if (folder / "parts" / f"{n:06d}" / "part.json").is_file()}
    _check_all(there, count, folder)
    return WorkResult(folder, count, count, call(folder))


def _check_all(there: set[int], count: int, plan: Path | str) -> None:
    if missing := sorted({*range(count)} - there):
        raise InvalidInputError(
            f"{len(missing)} of {count} parts of {plan} are missing, the first is part {missing[0]}: "
            "make them with `qdeploy work`"
        )


# -- in an object store ------------------------------------------------------------------------------------


def _publish(plan: str | Path, address: str) -> WorkResult:
    folder = find_plan(plan)
    if not is_address(address):
        raise UsageError(f"a plan is published at an address such as s3://bucket/job, not {address!r}")
    store = ObjectStore(address)
    store.publish(folder)
    return WorkResult(store.address, int(read_plan(folder)["count"]), len(store.there()))


@contextmanager
def _fetched(store: ObjectStore) -> Iterator[Path]:
    """A folder with the plan, for as long as it is worked on."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-work-") as name:
        folder = Path(name)
        store.fetch(folder)
        yield folder


def _work_at(store: ObjectStore, share: tuple[int, int] | None) -> WorkResult:
    with _fetched(store) as folder:
        job = open_job(folder)
        there = store.there()
        numbers = [n for n in _numbers(share, job.count) if n not in there]
        if share is None:  # machines that share all parts begin at different ones
            begin = random.SystemRandom().randrange(len(numbers) or 1)
            numbers = numbers[begin:] + numbers[:begin]
        with job.parts() as parts:
            for number in numbers if job.shows_progress else track(numbers, job.label):
                if store.has(number):
                    continue
                parts.keep(number, job.make)
                store.put(number, pack(parts.path(number)))
                shutil.rmtree(parts.path(number))
        return WorkResult(store.address, job.count, len(store.there()))


def _finish_from(store: ObjectStore) -> WorkResult:
    with _fetched(store) as folder:
        job = open_job(folder, own_place=True)
    _check_all(store.there(), job.count, store.address)
    job.write()
    with job.parts() as parts:
        for number in track(parts.missing(), "parts"):
            try:
                parts.accept(number, store.get(number))
            except InvalidInputError as error:
                store.remove(number)
                raise InvalidInputError(f"{error}; it is removed: make it with `qdeploy work`") from error
    result = call(job.folder)
    store.clear()
    return WorkResult(store.address, job.count, job.count, result)


def _numbers(share: tuple[int, int] | None, count: int) -> range:
    """Of the parts of a share, all by default."""
    first, step = share or (1, 1)
    return range(first - 1, count, step)


def _share(part: str) -> tuple[int, int]:
    first, slash, count = part.partition("/")
    if slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count):
        return int(first), int(count)
    raise UsageError(f"a share of the parts is K/N with K from 1 to N, as in 3/8, not {part!r}")
