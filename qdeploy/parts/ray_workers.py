"""Parts on Ray: workers on this machine or of a cluster, each with a share of its processors and a GPU of its own.

Parts go through the plan's folder where workers see it, and come back through Ray where they do not. A worker that is
killed is started again, and its part is made by whoever is free.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.parts.folder import AWAY, PLAN, PartFolder
from qdeploy.parts.packed import pack
from qdeploy.parts.plan import Job, open_job
from qdeploy.parts.run import RAY, make_parts
from qdeploy.store.files import write_json
from qdeploy.system.devices import kind_of
from qdeploy.system.errors import CapabilityError, QDeployError
from qdeploy.system.progress import say, track
from qdeploy.version import __version__

RETRIES = 3  # of one part, where a worker or its storage is lost
LEAVING = 5.0  # seconds that workers have to clean up


class Worker:
    """A process that makes parts of one plan.

    Args:
        folder: of the plan.
        plan: its content.
    """

    def __init__(self, folder: str, plan: Mapping[str, Any]) -> None:
        self.folder, self.plan = Path(folder), plan
        self.job: Job | None = None
        self.own: Path | None = None  # a folder of this process, where it does not see the plan's

    def ready(self) -> dict[str, Any]:
        """What this process runs, and whether it sees the plan's folder."""
        return {"version": __version__, "sees_folder": self.folder.is_dir()}

    def make(self, number: int, shared: bool) -> tuple[int, str] | bytes | None:
        """Make a part.

        Args:
            number: of the part.
            shared: whether workers see the plan's folder.

        Returns:
            The packed part where the folder is not shared; or the exit code and the sentence of an error that another
            try would not mend.

        Raises:
            OSError: storage is away; another try may find it there.
        """
        try:
            if self.job is None:
                self.job = open_job(self.folder if shared else self._own_folder())
            parts = self.job.parts()
            make_parts(self.job, parts, [number])
            if shared:
                return None
            packed = pack(parts.path(number))
            shutil.rmtree(parts.path(number))
            return packed
        except QDeployError as error:
            cause = error.__cause__
            if shared and isinstance(cause, OSError) and cause.errno in AWAY:
                raise OSError(str(error)) from None
            return error.exit_code, str(error)

    def leave(self) -> None:
        """Remove the folder of this process."""
        if self.own is not None:
            shutil.rmtree(self.own)

    def _own_folder(self) -> Path:
        """A folder of this process, with the plan."""
        self.own = Path(tempfile.mkdtemp(prefix="qdeploy-work-"))
        write_json(self.own / PLAN, self.plan)
        return self.own


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
        plan = job.plan()
        actor: Any = ray.remote(Worker).options(
            num_cpus=worker_cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=RETRIES
        )
        everyone = [actor.remote(str(job.folder.resolve()), plan) for _ in range(count)]
        free = list(everyone)
        shared = _check(ray, free[0], job)
        tries: Counter[int] = Counter()
        running: dict[Any, tuple[Any, int]] = {}
        bar = iter(track(range(len(missing)), f"{job.label}, {count} workers"))
        while missing or running:
            while missing and free:
                worker, number = free.pop(), missing.pop(0)
                running[worker.make.remote(number, shared)] = worker, number
            finished, _ = ray.wait(list(running), num_returns=1)
            worker, number = running.pop(finished[0])
            free.append(worker)
            try:
                answer = ray.get(finished[0])
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
            if isinstance(answer, bytes):
                parts.accept(number, io.BytesIO(answer))
            elif answer is not None:
                raise _error(*answer)
            next(bar, None)
        for _ in bar:
            pass
    finally:
        leaving = [worker.leave.remote() for worker in everyone]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=LEAVING)
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


def _check(ray: Any, worker: Any, job: Job) -> bool:
    """Whether workers see the plan's folder.

    Raises:
        CapabilityError: they are of another version, or do not start.
    """
    try:
        state = ray.get(worker.ready.remote())
    except Exception as error:  # of Ray: the package is not there, or the process does not start
        raise CapabilityError(f"a worker on Ray does not start: {_in_short(error)}") from error
    if state["version"] != __version__:
        raise CapabilityError(
            f"the workers run qdeploy {state['version']}, and this is {__version__}: use one version on all machines"
        )
    if not state["sees_folder"]:
        say(f"the workers do not see {job.folder}: parts come back through Ray", level=2)
    return bool(state["sees_folder"])


def _error(code: int, message: str) -> QDeployError:
    kinds = {kind.exit_code: kind for kind in QDeployError.__subclasses__()}
    return kinds.get(code, QDeployError)(message)


def _in_short(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
