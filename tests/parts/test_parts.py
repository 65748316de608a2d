"""Parts: made once or twice, in any order, by anyone, and never lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qdeploy.parts import leases
from qdeploy.parts.folder import PartFolder, check_alone, parts_of
from qdeploy.parts.plan import Job, find_plan, open_job
from qdeploy.parts.ray_workers import Worker
from qdeploy.parts.run import made, make_parts
from qdeploy.sampling.media_files import write_npz
from qdeploy.store.files import save_tensors, write_text
from qdeploy.store.joined_tensors import join_tensors
from qdeploy.system.errors import CapabilityError, InvalidInputError, Planned, UsageError


def write(number: int, folder: Path) -> None:
    (folder / "value").write_text(str(number**2))


def job_in(folder: Path, count: int = 5, planned: bool = False) -> Job:
    return Job("sample", folder, "a" * 64, count, folder.parent / "out", {} if planned else None, write)


def values(parts: PartFolder) -> list[str]:
    return [files["value"].read_text() for files in parts.each(write)]


def test_parts_are_read_in_order_whatever_order_they_were_made_in(tmp_path: Path) -> None:
    job = job_in(tmp_path / "plan")
    with job.parts() as parts:
        for number in (3, 0, 4, 3, 1):
            parts.keep(number, write)
        assert parts.missing() == [2]
        assert values(parts) == ["0", "1", "4", "9", "16"]


def test_what_is_damaged_is_made_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    job, again = job_in(tmp_path / "plan"), []
    with job.parts() as parts:
        make_parts(job, parts, range(5))
        (parts.path(1) / "value").write_text("9")
        (parts.path(2) / "part.json").write_text("{")
        (parts.path(3) / "value").unlink()

        def watched(number: int, folder: Path) -> None:
            again.append(number)
            write(number, folder)

        assert [files["value"].read_text() for files in parts.each(watched)] == ["0", "1", "4", "9", "16"]
    assert again == [1, 2, 3]


def test_a_part_of_another_plan_is_named_and_the_others_stay(tmp_path: Path) -> None:
    job = job_in(tmp_path / "plan")
    other = PartFolder(job.folder, "b" * 64, 5, "out")
    with job.parts() as parts:
        other.keep(2, write)
        make_parts(job, parts, range(5))
        with pytest.raises(InvalidInputError, match="part of another plan"):
            values(parts)
    assert job.parts().missing() == []


def test_a_full_disk_is_one_sentence_and_no_part(tmp_path: Path) -> None:
    def full(number: int, folder: Path) -> None:
        (folder / "value").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = job_in(tmp_path / "plan")
    with job.parts() as parts:
        parts.keep(0, write)
        with pytest.raises(CapabilityError, match="no space left for "):
            parts.keep(1, full)
        assert parts.missing() == [1, 2, 3, 4]
        assert [path.name for path in (job.folder / "parts").iterdir()] == ["000000"]


def test_a_worker_of_ray_tells_what_another_try_would_not_mend(tmp_path: Path) -> None:
    def make(number: int, folder: Path) -> None:
        if number == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        write(number, folder)

    worker = Worker(str(tmp_path / "plan"), {})
    worker.job = job_in(tmp_path / "plan", planned=True)
    worker.job.write()
    worker.job.make = make
    assert worker.make(0, shared=True) is None
    told = worker.make(1, shared=True)
    assert isinstance(told, tuple)
    assert told[0] == CapabilityError.exit_code
    assert told[1].startswith("no space left for ")
    with pytest.raises(OSError, match="Stale"):
        worker.make(2, shared=True)
    assert worker.job.parts().missing() == [1, 2, 3, 4]


def test_a_first_failure_leaves_nothing(tmp_path: Path) -> None:
    def broken(number: int, folder: Path) -> None:
        raise InvalidInputError("no")

    job = job_in(tmp_path / ".out.parts" / "a")
    job.make = broken
    with pytest.raises(InvalidInputError), made(job):
        pass
    assert not list(tmp_path.iterdir())


def test_two_at_once_share_the_parts(tmp_path: Path) -> None:
    count, seen, guard = 12, [], threading.Lock()
    together = threading.Barrier(2)

    def slow(number: int, folder: Path) -> None:
        with guard:
            seen.append(number)
        if len(seen) <= 2:
            together.wait(timeout=20)  # both are at work at the same time
        write(number, folder)

    def run() -> None:
        job = job_in(tmp_path / "plan", count)
        job.make = slow
        with made(job) as parts:
            found.append(values(parts))
            parts.done()

    found: list[list[str]] = []
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [[str(number**2) for number in range(count)]] * 2
    assert sorted(seen) == list(range(count))
    assert not (tmp_path / "plan").exists()


def test_a_lease_ends_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, pathlib, qdeploy.parts.leases as leases; leases.take(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "gone")], check=True)
    assert (tmp_path / "gone").exists()
    assert not leases.is_alive(tmp_path / "gone")
    mine = leases.take(tmp_path / "gone")
    assert mine is not None
    assert leases.take(tmp_path / "gone") is None
    with mine:
        (tmp_path / "gone").rename(tmp_path / "away")
    (tmp_path / "away").rename(tmp_path / "gone")  # storage was away when it was given up
    again = leases.take(tmp_path / "gone")
    assert again is not None
    with again:
        assert leases.take(tmp_path / "gone") is None
    assert not (tmp_path / "gone").exists()
    (tmp_path / "far").write_text("elsewhere 1")  # of another machine: by its last sign of life alone
    assert leases.take(tmp_path / "far") is None
    os.utime(tmp_path / "far", (0, 0))
    assert leases.take(tmp_path / "far") is not None
    (tmp_path / "lost").touch()  # its content went with the power
    assert leases.take(tmp_path / "lost") is None
    os.utime(tmp_path / "lost", (0, 0))
    assert leases.take(tmp_path / "lost") is not None


class Storage:
    """A disk that one worker sees by a link, which can be cut; the others see it by its own path."""

    def __init__(self, folder: Path) -> None:
        self.own, self.link = folder / "disk", folder / "mount"
        self.own.mkdir()
        self.link.symlink_to(self.own)

    def cut(self) -> None:
        self.link.unlink()

    def mend(self) -> None:
        shutil.rmtree(self.link, ignore_errors=True)  # a folder to mount on, if something has made one
        self.link.symlink_to(self.own)


@pytest.mark.parametrize("moment", ["before the claim", "while it is made", "after it was made"])
def test_a_worker_that_is_cut_off_from_its_storage_waits_for_it(tmp_path: Path, moment: str) -> None:
    storage, tries = Storage(tmp_path), []
    job_in(storage.own / ".out.parts" / "plan", planned=True).write()
    job = job_in(storage.link / ".out.parts" / "plan", planned=True)

    def mend_soon() -> None:
        storage.cut()
        threading.Timer(0.6, storage.mend).start()

    def make(number: int, folder: Path) -> None:
        tries.append(number)
        if number == 2 and tries.count(2) == 1:
            if moment == "while it is made":
                mend_soon()
                write_text(folder / "value", "4")  # makes folders where there are none
                return
            if moment == "after it was made":
                write(number, folder)
                mend_soon()
                return
        write(number, folder)

    job.make = make
    if moment == "before the claim":
        mend_soon()
    make_parts(job, job.parts(), range(5))
    with job_in(storage.own / ".out.parts" / "plan", planned=True).parts() as parts:
        assert values(parts) == ["0", "1", "4", "9", "16"]
    assert tries.count(2) == (1 if moment == "before the claim" else 2)


def test_storage_that_stays_away_is_one_sentence_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdeploy.parts.folder.PATIENCE", 0.3)
    storage = Storage(tmp_path)
    job_in(storage.own / "plans" / "plan", planned=True).write()
    job = job_in(storage.link / "plans" / "plan", planned=True)
    with job.parts() as parts:
        make_parts(job, parts, [0, 1])
        storage.cut()
        with pytest.raises(CapabilityError, match=r"has been away for 0\.3 s: finished parts are kept"):
            make_parts(job, parts, [2])
        with pytest.raises(UsageError, match="is away: run the same command again"):
            parts.files(0)
        storage.mend()
        assert parts.missing() == [2, 3, 4]


def test_an_input_that_is_missing_is_no_storage_that_is_away(tmp_path: Path) -> None:
    job, tries = job_in(tmp_path / "plan", planned=True), []

    def make(number: int, folder: Path) -> None:
        tries.append(number)
        (tmp_path / "input").read_text()

    job.make = make
    with pytest.raises(UsageError, match="No such file"), made(job):
        pass
    assert len(tries) <= 4


def test_another_request_for_the_same_output_waits_or_goes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    one, other = (job_in(parts_of(output, name * 64)) for name in "ab")
    with one.parts() as parts:
        parts.keep(0, write)
        with pytest.raises(UsageError, match="another process is writing"):
            check_alone(other.folder, output)
    check_alone(other.folder, output)
    assert not one.folder.exists()


def test_plans_are_found_by_the_output_and_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = job_in(parts_of(output, "a" * 64), planned=True)
    with pytest.raises(Planned) as planned, made(job, on="plan"):
        pass
    assert planned.value.folder == job.folder == find_plan(output) == find_plan(job.folder)
    with pytest.raises(InvalidInputError, match="is no plan"):
        find_plan(tmp_path / "other")
    text = (job.folder / "plan.json").read_text()
    (job.folder / "plan.json").write_text(text.replace('"version": "', '"version": "9'))
    with pytest.raises(InvalidInputError, match="one version on all machines"):
        open_job(job.folder)
    (job.folder / "plan.json").write_text(text.replace('"sample"', '"os.system"'))
    with pytest.raises(InvalidInputError, match="is no plan of qdeploy"):
        open_job(job.folder)
    job.arguments, job.folder = None, tmp_path / "memory"
    with pytest.raises(UsageError, match="save the model to a folder"), made(job, on="plan"):
        pass


@pytest.mark.parametrize(
    "place", [{"on": "moon"}, {"workers": 2}, {"on": "ray", "workers": 0}, {"on": "ray", "worker_cpus": 0.0}]
)
def test_impossible_places_are_usage_errors(tmp_path: Path, place: dict[str, object]) -> None:
    with pytest.raises(UsageError), made(job_in(tmp_path / "plan"), **place):  # type: ignore[arg-type]
        pass
    assert not list(tmp_path.iterdir())


# -- what is written in pieces -----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
)
def test_joined_tensors_have_the_bytes_of_one_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], shape: list[int], dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    tensors = [torch.randint(0, 200, (count, *shape)).to(dtype) for count in rows]
    files = [folder / str(number) for number in range(len(rows))]
    for file, tensor in zip(files, tensors, strict=True):
        save_file({"images": tensor}, file)
    join_tensors(files, folder / "joined")
    save_tensors({"images": torch.cat(tensors)}, folder / "whole")
    assert (folder / "joined").read_bytes() == (folder / "whole").read_bytes()
    assert torch.equal(load_file(folder / "joined")["images"], torch.cat(tensors))


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file({"images": torch.zeros(2, 3)}, tmp_path / "a")
    save_file({"images": torch.zeros(2, 4)}, tmp_path / "b")
    with pytest.raises(InvalidInputError, match="does not fit"):
        join_tensors([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_an_npz_file_in_pieces_has_the_bytes_of_numpys(tmp_path: Path) -> None:
    parts = [torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8) for count in (2, 1)]
    for number, part in enumerate(parts):
        save_file({"images": part}, tmp_path / str(number))
    write_npz(tmp_path / "pieces.npz", [tmp_path / "0", tmp_path / "1"])
    np.savez(tmp_path / "whole.npz", torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy())
    assert (tmp_path / "pieces.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
