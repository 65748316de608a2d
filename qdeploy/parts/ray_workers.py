"""Parts on Ray: workers on this machine or of a cluster, each with a share of its processors and a GPU of its own.

Results go through the plan's folder, which all machines have to see under one path. A worker that is killed is
started again, and its part is made by whoever is free.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from qdeploy.parts.folder import AWAY, PartFolder
from qdeploy.parts.plan import Job, open_job
from qdeploy.parts.run import RAY, make_parts
from qdeploy.system.devices import kind_of
from qdeploy.system.errors import CapabilityError, QDeployError
from qdeploy.system.progress import say, track
from qdeploy.version import __version__

RETRIES = 3  # of one part, where a worker or its storage is lost


class Worker:
    """A process that makes parts of one plan.

    Args:
        folder: of the plan.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.job: Job | None = None

    def ready(self) -> dict[str, str]:
        """What this process runs."""
        return {"version": __version__, "folder": "there" if self.folder.is_dir() else "missing"}

    def make(self, number: int) -> tuple[int, str] | None:
        """Make a part.

        Returns:
            None; or the exit code and the sentence of an error that another try would not mend.

        Raises:
            OSError: storage is away; another try may find it there.
        """
        try:
            if self.job is None:
                self.job = open_job(self.folder)
            make_parts(self.job, self.job.parts(), [number])
        except QDeployError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in AWAY:
                raise OSError(str(error)) from None
            return error.exit_code, str(error)
        return None


def make_on_ray(job: Job, parts: PartFolder, on: str, workers: int | None, worker_cpus: float) -> None:
    """Make the parts that are missing.

    Args:
        job: what is made; its plan is written.
        parts: where they are kept.
        on: ``ray``, or the address of a cluster: ``ray://HOST:PORT``.
        workers: how many; by default as many as there is room for.
        worker_cpus: processors for each.

    Raises:
        CapabilityError: Ray is not installed, a cluster cannot be reached, or workers cannot use the plan.
        QDeployError: what a part failed with.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError as error:
        raise CapabilityError("work on Ray needs the package ray: pip install 'qdeploy[ray]'") from error
    missing = parts.missing()
    if not missing:
        return
    began_here = not ray.is_initialized()
    if began_here:
        _connect(ray, on, workers, worker_cpus)
    gpus = 1 if kind_of(job.device) == "cuda" else 0
    everyone: list[Any] = []
    try:
        count = min(workers or _room(ray, worker_cpus, gpus), len(missing))
        actor: Any = ray.remote(Worker).options(
            num_cpus=worker_cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES
        )
        everyone = [actor.remote(str(job.folder.resolve())) for _ in range(count)]
        free = list(everyone)
        _check(ray, free[0], job)
        tries: Counter[int] = Counter()
        running: dict[Any, tuple[Any, int]] = {}
        bar = iter(track(range(len(missing)), f"{job.label}, {count} workers"))
        while missing or running:
            while missing and free:
                worker, number = free.pop(), missing.pop(0)
                running[worker.make.remote(number)] = worker, number
            finished, _ = ray.wait(list(running), num_returns=1)
            worker, number = running.pop(finished[0])
            free.append(worker)
            try:
                failed = ray.get(finished[0])
            except (RayActorError, RayTaskError) as error:
                tries[number] += 1
                if tries[number] > RETRIES:
                    raise CapabilityError(
                        f"part {number} of {job.output} failed {RETRIES + 1} times on Ray; the other parts are kept: "
                        f"{_in_short(error)}"
                    ) from error
                say(f"part {number} is made again: {_in_short(error)}", level=2)
                missing.append(number)
                continue
            if failed is not None:
                raise _error(*failed)
            next(bar, None)
        for _ in bar:
            pass
    finally:
        for worker in everyone:
            ray.kill(worker)
        if began_here:
            ray.shutdown()


def _connect(ray: Any, on: str, workers: int | None, worker_cpus: float) -> None:
    """Start Ray on this machine, or connect to a cluster."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if on != RAY:
            ray.init(address=on, **quiet)
            return
        needed = None if workers is None else max(os.cpu_count() or 1, int(-(-workers * worker_cpus // 1)))
        ray.init(num_cpus=needed, include_dashboard=False, object_store_memory=100 * 2**20, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise CapabilityError(f"Ray at {on} cannot be reached: {_in_short(error)}") from error


def _room(ray: Any, worker_cpus: float, gpus: int) -> int:
    """How many workers a cluster has room for."""
    found = ray.cluster_resources()
    room = int(found.get("CPU", 0) // worker_cpus)
    return max(1, min(room, int(found.get("GPU", 0))) if gpus else room)


def _check(ray: Any, worker: Any, job: Job) -> None:
    """Refuse workers of another version, or without the plan's folder.

    Raises:
        CapabilityError: they are.
    """
    try:
        state = ray.get(worker.ready.remote())
    except Exception as error:  # of Ray: the package is not there, or the process does not start
        raise CapabilityError(f"a worker on Ray does not start: {_in_short(error)}") from error
    if state["version"] != __version__:
        raise CapabilityError(
            f"the workers run qdeploy {state['version']}, and this is {__version__}: use one version on all machines"
        )
    if state["folder"] != "there":
        raise CapabilityError(
            f"the workers do not see {job.folder}: put the output on a disk that all machines share"
        )


def _error(code: int, message: str) -> QDeployError:
    kinds = {kind.exit_code: kind for kind in QDeployError.__subclasses__()}
    return kinds.get(code, QDeployError)(message)


def _in_short(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
