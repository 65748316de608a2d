"""Machines that share no disk: parts go through an object store, or come back through Ray."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdeploy.parts import ray_workers
from qdeploy.parts.object_store import ObjectStore
from qdeploy.parts.packed import pack, unpack
from qdeploy.parts.plan import open_job
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import CapabilityError, InvalidInputError, Planned, UsageError
from qdeploy.workflows.work import work
from tests.parts.test_identity import VERBS, calibration_set, calls, cluster, planned, there, told

__all__ = ["calibration_set", "cluster"]  # fixtures

FEW: dict[str, Any] = {"steps": 2, "samples": 4, "batch": 2}


@pytest.fixture
def address() -> Iterator[str]:
    """A store in this process's memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    yield "memory://bucket/job"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_parts_through_a_store_give_what_one_process_gives(
    ddpm: Path, ddpm_engine: Artifact, tmp_path: Path, address: str, verb: str
) -> None:
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    folder = planned(calls(ddpm, ddpm_engine, tmp_path / "through")[verb])
    published = work(folder, publish=address)
    assert (published.plan, published.made) == (address, 0)
    with pytest.raises(InvalidInputError, match="are missing"):
        work(address, finish=True)
    for part in ("2/2", "1/2", "2/2", None):
        made = work(address, part=part)
    assert made.made == made.parts
    assert there(folder) == 0  # nothing went through the folder of the plan
    assert told(work(address, finish=True).result) == alone
    assert ObjectStore(address).there() == set()


def planned_sample(model: Path, output: Path, samples: int = 4) -> Path:
    with pytest.raises(Planned) as found:
        sample(model, output, on="plan", **{**FEW, "samples": samples})
    return found.value.folder


def test_a_damaged_part_is_removed_and_made_again(ddpm: Path, tmp_path: Path, address: str) -> None:
    work(planned_sample(ddpm, tmp_path / "out"), publish=address)
    work(address)
    store = ObjectStore(address)
    whole = store.get(1).read()
    for damaged in (whole[:700], whole.replace(b"request", b"re9uest"), b""):
        store.put(1, damaged)
        with pytest.raises(InvalidInputError, match="it is removed: make it"):
            work(address, finish=True)
        assert store.there() == {0}
        assert work(address, part="2/2").made == 2
    work(address, part="1/2")
    other = ObjectStore(address)
    other._files.pipe_file("/bucket/job/notes.txt", b"mine")
    made = work(address, finish=True).result
    assert other._files.cat_file("/bucket/job/notes.txt") == b"mine"  # only what was put there goes
    assert other.there() == set()
    assert made.sha256 == sample(ddpm, tmp_path / "alone", **FEW).sha256


def test_what_is_no_store_or_no_plan_is_one_sentence(ddpm: Path, tmp_path: Path, address: str) -> None:
    folder = planned_sample(ddpm, tmp_path / "out")
    work(folder, publish=address)
    work(folder, publish=address)
    with pytest.raises(UsageError, match="holds another plan"):
        work(planned_sample(ddpm, tmp_path / "other", 6), publish=address)
    for wrong, kind, words in (
        ("nosuch://bucket/job", UsageError, "no address of an object store"),
        ("memory://bucket/nothing", InvalidInputError, "holds no plan"),
    ):
        with pytest.raises(kind, match=words):
            work(wrong)
    with pytest.raises(UsageError, match="such as s3"):
        work(folder, publish=str(tmp_path))
    for both in ({"part": "1/2", "finish": True}, {"part": "1/2", "publish": address}):
        with pytest.raises(UsageError, match="give one of them"):
            work(address, **both)  # type: ignore[arg-type]


def test_a_store_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CapabilityError, match=r"needs a package that is not installed: .*s3fs"):
        ObjectStore("s3://bucket/job")


def test_a_packed_part_writes_plain_files_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "a.bin").write_bytes(bytes(range(256)))
    unpack(io.BytesIO(pack(source)), target)
    assert (target / "a.bin").read_bytes() == bytes(range(256))

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
        stream, info = io.BytesIO(), tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(info)
        return stream.getvalue()

    for hostile in (
        member("../out"), member("/out"), member("a/b"), member(".."),
        member("x", tarfile.SYMTYPE, "/etc/passwd"), member("x", tarfile.FIFOTYPE), member("x", tarfile.DIRTYPE),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match="no plain file"):
            unpack(io.BytesIO(hostile), target)
    assert {path.name for path in tmp_path.rglob("*")} == {"source", "target", "a.bin"}


class Elsewhere(ray_workers.Worker):
    """A worker on a machine that has the model, and not the disk of the plan."""

    def __init__(self, folder: str, plan: Any) -> None:
        super().__init__(f"{folder}-elsewhere", plan)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "check"])
def test_workers_of_ray_without_the_disk_send_parts_back(
    cluster: Any,
    ddpm: Path,
    ddpm_engine: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    alone = told(calls(ddpm, ddpm_engine, tmp_path / "alone")[verb]())
    monkeypatch.setattr(ray_workers, "Worker", Elsewhere)
    before = set(Path(tempfile.gettempdir()).glob("qdeploy-work-*"))
    call = calls(ddpm, ddpm_engine, tmp_path / "through")[verb]
    job = open_job(planned(call))
    with job.parts() as parts:
        ray_workers.make_on_ray(job, parts, "ray", 2, 1.0)
        assert parts.missing() == []
    assert set(Path(tempfile.gettempdir()).glob("qdeploy-work-*")) == before
    assert told(call()) == alone
