"""Drafts: an artifact is whole or not there, takes up where it was stopped, and says why it cannot be."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from qdeploy.store.artifact import Checkpoint, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.files import write_atomically
from qdeploy.store.manifest import MANIFEST, is_artifact
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from tests.helpers import files_in, small_artifact, small_draft, some_facts

# -- whole or not at all -----------------------------------------------------------------------------------


def test_nothing_is_at_the_output_before_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with small_draft(output) as work:
        work.tensors("weights.safetensors", lambda: {"x": torch.ones(2)})
        assert not output.exists()
        work.finish(some_facts())
    assert is_artifact(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_after_a_step(work: Draft, compute: Counted) -> None:
    with work:
        work.step("one", compute)
        _ = 1 / 0


def test_an_error_leaves_nothing_at_the_output_and_keeps_finished_steps(tmp_path: Path) -> None:
    output = tmp_path / "out"
    counted = Counted()
    with pytest.raises(ZeroDivisionError):
        fail_after_a_step(small_draft(output), counted)
    assert not output.exists()
    with small_draft(output) as work:
        work.step("one", counted)
    assert counted.calls == 1


def test_an_error_before_the_first_step_leaves_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), small_draft(tmp_path / "out"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


class Counted:
    """Tensors, and how often they were computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"x": torch.arange(4)}


def test_another_request_takes_up_nothing(tmp_path: Path) -> None:
    output, counted = tmp_path / "out", Counted()
    for change in ({}, {}, {"seed": 4}, {"options": {"steps": 2}}, {"recipe": None}):
        with small_draft(output, **change) as work:
            work.step("one", counted)
    assert counted.calls == 4


def test_half_written_files_of_a_killed_process_are_not_taken_up(tmp_path: Path) -> None:
    output, counted = tmp_path / "out", Counted()
    with small_draft(output) as work:
        work.steps.joinpath(".one.safetensors.123").write_bytes(b"half")
        work.content.joinpath(".config.json.123").write_bytes(b"half")
        work.json("config.json", {})
    with small_draft(output) as work:
        assert torch.equal(work.step("one", counted)["x"], torch.arange(4))
        made = work.finish(some_facts())
    assert set(files_in(made.path)) == {MANIFEST, "config.json"}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(file, fail)
    assert files_in(tmp_path) == {"file": b"old"}


SCRIPT = """
import sys, time, torch
from pathlib import Path
from qdeploy.store.artifact import Checkpoint
from qdeploy.store.builder import Draft
from tests.helpers import some_facts

output, pause = Path(sys.argv[1]), float(sys.argv[2])
with Draft(output, Checkpoint, {"model": "a" * 64}, None, 7) as draft:
    for number in range(3):
        def compute():
            print("computing", number, flush=True)
            time.sleep(pause if number == 2 else 0)
            return {"x": torch.full((4,), float(number))}
        draft.step(f"step-{number}", compute)
        draft.tensors(f"part-{number}.safetensors", lambda: draft.step(f"step-{number}", compute))
    print(draft.finish(some_facts()).sha256, flush=True)
"""


def start(output: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(output), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """The output of a process that was killed, without a chance to clean up, in its third step."""
    process = start(tmp_path / "out", 600)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "computing 2":
                break
        with pytest.raises(UsageError, match="another process is writing"), in_script(tmp_path / "out"):
            pass
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return tmp_path / "out"


def in_script(output: Path) -> Draft:
    return Draft(output, Checkpoint, {"model": "a" * 64}, None, 7)


def test_kill_leaves_nothing_at_the_output_and_the_next_run_ends_the_same(
    killed: Path, tmp_path: Path
) -> None:
    """The lock of the living process kept others out; that of the dead one does not."""
    assert not killed.exists()
    lines = {}
    for output in (killed, tmp_path / "other"):
        process = start(output, 0)
        lines[output] = process.communicate()[0].split("\n")
        assert process.returncode == 0
    assert lines[killed][:-2] == ["computing 2"]  # the steps before were found again
    assert lines[tmp_path / "other"][:-2] == ["computing 0", "computing 1", "computing 2"]
    assert lines[killed][-2] == lines[tmp_path / "other"][-2]
    one, other = files_in(killed), files_in(tmp_path / "other")
    assert {**one, MANIFEST: b""} == {**other, MANIFEST: b""}


# -- two writers -------------------------------------------------------------------------------------------


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with small_draft(output) as first:
        first.step("one", Counted())
        with pytest.raises(UsageError, match="another process is writing"), small_draft(output):
            pytest.fail("both were let in")
        with small_draft(tmp_path / "elsewhere"):
            pass
        first.finish(some_facts())
    open_artifact(output)


def test_a_lock_is_gone_with_its_holder(tmp_path: Path) -> None:
    for _ in range(3):
        with small_draft(tmp_path / "out") as work:
            work.step("one", Counted())


# -- what is there already ---------------------------------------------------------------------------------


def test_the_same_request_is_already_done(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "out")
    done = small_draft(tmp_path / "out").finished()
    assert done is not None
    assert done.manifest == made.manifest


def test_another_request_is_refused_and_overwrites_only_when_told(tmp_path: Path) -> None:
    first = small_artifact(tmp_path / "out")
    with pytest.raises(UsageError, match=r"another artifact.*--overwrite"):
        small_draft(tmp_path / "out", seed=4).finished()
    assert open_artifact(first.path).sha256 == first.sha256
    assert small_draft(tmp_path / "out", seed=4, overwrite=True).finished() is None
    second = small_artifact(tmp_path / "out", seed=4, overwrite=True)
    assert open_artifact(first.path).sha256 == second.sha256 != first.sha256


def test_overwriting_keeps_the_old_artifact_until_the_new_one_is_whole(tmp_path: Path) -> None:
    first = small_artifact(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fail_after_a_step(small_draft(tmp_path / "out", seed=4, overwrite=True), Counted())
    assert open_artifact(tmp_path / "out").sha256 == first.sha256


@pytest.mark.parametrize("seed", [3, 4])
def test_a_damaged_artifact_can_be_made_again_when_told(tmp_path: Path, seed: int) -> None:
    """The message about damage says so: make it again."""
    made = small_artifact(tmp_path / "out")
    for name in files_in(made.path):
        (made.path / name).write_bytes(b"damaged")
        assert small_draft(tmp_path / "out", seed=seed, overwrite=True).finished() is None
        made = small_artifact(tmp_path / "out", seed=seed, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    file.write_text("precious")
    for output in (folder, file):
        with pytest.raises(UsageError, match="already exists"):
            small_draft(output, overwrite=overwrite).finished()
    assert files_in(tmp_path) == {"folder/thesis.tex": b"precious", "file": b"precious"}


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert small_draft(tmp_path / "out").finished() is None
    small_artifact(tmp_path / "out")
    open_artifact(tmp_path / "out")


# -- a system that refuses ---------------------------------------------------------------------------------


def test_a_full_disk_is_explained_and_finished_steps_are_kept(small_disk: Path) -> None:
    output, counted = small_disk / "out", Counted()

    def fill() -> None:
        with small_draft(output) as work:
            work.step("one", counted)
            work.step("two", lambda: {"x": torch.zeros(200_000)})

    with pytest.raises(CapabilityError, match=r"no space left for .*out.*finished steps are kept"):
        fill()
    assert not output.exists()
    with small_draft(output) as work:
        work.step("one", counted)
        work.step("two", lambda: {"x": torch.zeros(10)})
        work.finish(some_facts())
    assert counted.calls == 1
    open_artifact(output)


Write = Callable[[Draft], Any]
WRITES: dict[str, Write] = {
    "step": lambda work: work.step("two", Counted()),
    "tensors": lambda work: work.tensors("two.safetensors", Counted()),
    "json": lambda work: work.json("config.json", {}),
    "finish": lambda work: work.finish(some_facts()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    ("code", "expected"), [("ENOSPC", CapabilityError), ("EDQUOT", CapabilityError), ("EACCES", UsageError)]
)
def test_a_refused_write_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, code: str, expected: type[Exception]
) -> None:
    """Wherever the system refuses: here it does so when a file is forced to the disk."""
    number = getattr(errno, code)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    def work_on() -> None:
        with small_draft(tmp_path / "out") as work:
            work.step("one", Counted())
            monkeypatch.setattr(os, "fsync", refuse)
            write(work)

    with pytest.raises(expected) as caught:
        work_on()
    assert str(tmp_path / "out") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_that_safetensors_reports_in_words_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `test_a_full_disk_is_explained_and_finished_steps_are_kept`, where nothing can be mounted."""

    def refuse(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def work_on() -> None:
        with small_draft(tmp_path / "out") as work:
            work.step("one", Counted())
            monkeypatch.setattr("safetensors.torch.save_file", refuse)
            work.step("two", Counted())

    with pytest.raises(CapabilityError, match="no space left"):
        work_on()
    monkeypatch.undo()
    with small_draft(tmp_path / "out") as work:
        assert [file.name for file in work.steps.iterdir()] == ["one.safetensors"]


def test_an_output_that_cannot_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), small_draft(tmp_path / "file" / "out"):
        pytest.fail("a file was taken for a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"), small_draft(tmp_path / "out"):
        pytest.fail("a forbidden folder was written to")


def test_errors_of_the_work_itself_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="mine"), small_draft(tmp_path / "out"):
        raise InvalidInputError("mine")


def test_the_time_it_took_is_noted(tmp_path: Path) -> None:
    before = time.perf_counter()
    made = small_artifact(tmp_path / "a")
    assert 0 <= made.measured.seconds <= time.perf_counter() - before + 0.001
