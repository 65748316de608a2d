"""Whoever makes the parts of a verb, in whatever order and however often: the result has the bytes of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.check import check
from qdeploy.mixed.sensitivity import sensitivity
from qdeploy.parts import ray_workers
from qdeploy.parts.folder import PartFolder
from qdeploy.parts.plan import open_job
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.store.paths import cache_folder
from qdeploy.system.errors import CapabilityError, InvalidInputError, Planned, QDeployError, UsageError
from qdeploy.workflows.work import work

ROOT = Path(__file__).parents[2]
FEW: dict[str, Any] = {"steps": 3, "samples": 7, "batch": 2}

Call = Callable[..., Any]


def calls(model: Path, engine: Artifact, output: Path) -> dict[str, Call]:
    """The verbs that work in parts, each as a call that takes a place."""
    return {
        "sample": lambda **place: sample(model, output, npz=True, **FEW, **place),
        "collect": lambda **place: collect(model, output, keep=2, **FEW, **place),
        "sensitivity": lambda **place: sensitivity(
            model, output, calibration=output.parent / "set", formats=["int4"], rows=4, probes=1, **place
        ),
        "check": lambda **place: check(engine, reference=model, keep=2, min_sqnr=0, **FEW, **place),
    }


def told(result: Any) -> Any:
    """What has to be equal: an artifact's identity, or all that a check found."""
    return result.sha256 if isinstance(result, Artifact) else result.to_json()


@pytest.fixture(autouse=True)
def calibration_set(request: pytest.FixtureRequest, ddpm: Path, tmp_path: Path) -> None:
    """What sensitivities are measured on, where they are."""
    if "sensitivity" in request.node.name:
        collect(ddpm, tmp_path / "set", keep=2, samples=2, steps=3)


def planned(call: Call) -> Path:
    with pytest.raises(Planned) as found:
        call(on="plan")
    return found.value.folder


def there(folder: Path) -> int:
    return len(list(folder.glob("parts/[0-9]*/part.json")))


VERBS = ("sample", "collect", "sensitivity", "check")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_parts_in_any_order_by_shares_and_twice(
    ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, verb: str
) -> None:
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    call = calls(ddpm, ddpm_engine, tmp_path / "shared")[verb]
    folder = planned(call)
    job = open_job(folder)
    assert job.parts().planned  # a worker waits for storage that is away
    numbers = [*range(4), 1]
    random.Random(3).shuffle(numbers)
    with job.parts() as parts:
        for number in numbers[:3]:
            parts.keep(number, job.make)
    with pytest.raises(InvalidInputError, match="are missing"):
        work(folder, finish=True)
    for part in ("2/2", "1/2", "2/2"):
        made = work(folder, part=part)
    assert made.made == made.parts == job.count
    assert told(work(folder, finish=True).result) == alone
    assert not folder.exists()
    if verb != "check":
        assert told(call()) == alone


def test_what_cannot_be_shared_is_refused(ddpm: Path, ddpm_engine: Artifact, tmp_path: Path) -> None:
    call = calls(ddpm, ddpm_engine, tmp_path / "out")["sample"]
    folder = planned(call)
    for part in ("0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(UsageError, match="K from 1 to N"):
            work(folder, part=part)
    with pytest.raises(UsageError, match="give one of them"):
        work(folder, part="1/2", finish=True)
    plan = json.loads((folder / "plan.json").read_text())
    plan["arguments"]["samples"] += 2
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InvalidInputError, match="not those of the plan"):
        work(folder, part="1/2")
    with pytest.raises(UsageError, match="full-precision model"):
        check(ddpm_engine, on="plan")


def test_a_journal_of_a_check_holds_features_and_little_else(digits_parts: PartFolder) -> None:
    """Features of 2 x 64 images; no pixels, no trajectories."""
    from safetensors.torch import load_file

    kinds = ("fd_local.", "inception_score.", "kid.", "spatial_frechet.")
    files = list(digits_parts.path(0).iterdir())
    (observed,) = (load_file(path) for path in files if path.suffix == ".safetensors")
    features = sum(x.numel() * x.element_size() for name, x in observed.items() if name.startswith(kinds))
    assert features == 64 * 2 * 4 * (64 + 112 + 10)  # pooled, an inner layer, logits
    assert sum(path.stat().st_size for path in files) <= 1.01 * features + 4096  # a header for each part


@pytest.fixture
def digits_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PartFolder]:
    """Parts of a comparison of ``digits`` with itself, 2 steps."""
    from dataclasses import replace

    from qdeploy.evaluate.metric_context import MetricContext
    from qdeploy.evaluate.quality import QualityPlan, Trajectories
    from qdeploy.evaluate.quality_parts import quality_parts
    from qdeploy.model.folder import open_model
    from qdeploy.model.sampling import CHECKING

    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path))
    model = open_model("digits")
    plan = QualityPlan(replace(CHECKING, steps=2, batch=64), samples=64, keep=1)
    job = quality_parts(Trajectories(model, plan), model.load(), MetricContext(model), "itself").job
    with job.parts() as parts:
        parts.keep(0, job.make)
        yield parts


# -- killed, and on Ray ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_worker_that_is_killed_costs_a_part(
    ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, verb: str
) -> None:
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    call = calls(ddpm, ddpm_engine, tmp_path / "killed")[verb]
    folder = planned(call)
    command = [sys.executable, "-m", "qdeploy.cli", "work", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QDEPLOY_CACHE": str(cache_folder())}
    worker = subprocess.Popen(command, env=environment, cwd=tmp_path)
    while there(folder) < 1 and worker.poll() is None:
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert there(folder) >= 1
    assert told(call()) == alone
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_machines_with_caches_of_their_own_share_the_plan_alone(
    ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes over one shared folder: one plans and finishes, two make the parts."""
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache-0"))
    call = calls(ddpm, ddpm_engine, tmp_path / "shared")[verb]
    folder = planned(call)
    workers = []
    for share, node in (("1/2", "cache-1"), ("2/2", "cache-2")):
        command = [sys.executable, "-m", "qdeploy.cli", "work", str(folder), "--part", share]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "QDEPLOY_CACHE": str(tmp_path / node)}
        workers.append(subprocess.Popen(command, env=environment, cwd=tmp_path))
    assert [worker.wait() for worker in workers] == [0, 0]
    assert there(folder) == open_job(folder).count
    assert told(work(folder, finish=True).result) == alone


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine, with two processors."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "QDEPLOY_CACHE": str(cache_folder())}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """SIGKILL to one of Ray's workers, once there is a part."""
    import psutil

    while there(folder) < 1:
        time.sleep(0.02)
    workers = [
        each
        for each in psutil.process_iter(["cmdline"])
        if "ray::Worker" in " ".join(each.info["cmdline"] or [])
    ]
    mine = [each for each in workers if any(p.pid == os.getpid() for p in each.parents())]
    for each in mine[:1]:
        each.kill()
        killed.append(each.pid)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_two_workers_of_ray_one_of_them_killed(
    cluster: Any, ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, verb: str
) -> None:
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    call = calls(ddpm, ddpm_engine, tmp_path / "ray")[verb]
    folder, killed = planned(call), []
    killer = threading.Thread(target=kill_a_worker, args=(folder, killed), daemon=True)
    killer.start()
    assert told(call(on="ray", workers=2)) == alone
    killer.join(timeout=10)
    assert len(killed) == 1


@pytest.mark.slow
def test_workers_of_another_version_are_refused_and_those_on_another_disk_known(
    cluster: Any, ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = calls(ddpm, ddpm_engine, tmp_path / "out")["sample"]
    job = open_job(planned(call))
    with monkeypatch.context() as patch:
        patch.setattr(ray_workers, "__version__", "99.0")
        with pytest.raises(CapabilityError, match=r"the workers run qdeploy .*, and this is 99\.0"):
            call(on="ray", workers=1)
    for folder, sees in ((tmp_path / "not-mounted", False), (tmp_path, True)):
        worker = cluster.remote(ray_workers.Worker).remote(str(folder), job.plan())
        assert ray_workers._check(cluster, worker, job) is sees
    assert there(job.folder) == 0


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_sentence(
    ddpm: Path, ddpm_engine: Artifact, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(QDeployError, match="cannot be reached") as error:
        calls(ddpm, ddpm_engine, tmp_path / "out")["sample"](on="ray://127.0.0.1:1")
    assert error.value.exit_code == 4
