"""Artifacts: whole or not at all, the same for the same request, and any damage is found."""

from __future__ import annotations

import errno
import json
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
from torch import Tensor

from qdeploy import artifact as module
from qdeploy.artifact import (
    MANIFEST,
    SCHEMA,
    Artifact,
    is_artifact,
    open_artifact,
    read_manifest,
    sha256_file,
    sha256_files,
    sha256_of,
)
from qdeploy.draft import Draft
from qdeploy.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.files import write_atomically

REQUEST: dict[str, Any] = {
    "kind": "checkpoint",
    "made_from": {"model": "a" * 64},
    "recipe": {"method": "minmax", "seed": 3},
    "seed": 3,
}


def draft(output: Path, **changes: Any) -> Draft:
    return Draft(output, **{**REQUEST, **changes})


def make(output: Path, content: float = 1.0, **changes: Any) -> Artifact:
    """A small artifact, with a file in a folder and one beside it."""
    facts = changes.pop("facts", {"layers": 4})
    measured, notes = changes.pop("measured", None), changes.pop("notes", None)
    with draft(output, **changes) as work:
        work.tensors("part/weights.safetensors", lambda: {"x": torch.full((3,), content)})
        work.json("config.json", {"size": 8})
        return work.finish(facts, measured, notes)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# -- identity ----------------------------------------------------------------------------------------------


def test_equal_content_made_in_the_same_way_has_an_equal_hash(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b" / "c")
    assert first.sha256 == second.sha256
    assert open_artifact(first.path).manifest == first.manifest


def test_measurements_and_notes_are_not_part_of_the_identity(tmp_path: Path) -> None:
    plain = make(tmp_path / "a")
    told = make(tmp_path / "b", measured={"seconds": 1e6, "peak": 7}, notes={"source": "/somewhere"})
    assert plain.sha256 == told.sha256
    assert plain.manifest != told.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"content": 2.0},
        {"facts": {"layers": 5}},
        {"seed": 4},
        {"made_from": {"model": "b" * 64}},
        {"recipe": {"method": "lp", "seed": 3}},
        {"kind": "onnx"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_determines_the_content_is_part_of_it(tmp_path: Path, change: dict[str, Any]) -> None:
    assert make(tmp_path / "a").sha256 != make(tmp_path / "b", **change).sha256


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_of({"a": 1, "b": {"c": 2, "d": 3}}) == sha256_of({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_hash_of_files_depends_on_names_and_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1"), two.write_bytes(b"2")
    assert sha256_files({"x": one, "y": two}) == sha256_files({"y": two, "x": one})
    assert sha256_files({"x": one, "y": two}) != sha256_files({"x": two, "y": one})
    assert sha256_file(one) != sha256_file(two)


# -- damage ------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One bit of each byte of each file, the manifest's own included."""
    made = make(tmp_path / "a", notes={"über": "ß"})
    for name, content in files(made.path).items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            (made.path / name).write_bytes(damaged)
            with pytest.raises(InvalidInputError):
                open_artifact(made.path)
        (made.path / name).write_bytes(content)
    open_artifact(made.path)


def test_truncated_and_missing_files_are_found_and_named(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    for name, content in files(made.path).items():
        (made.path / name).write_bytes(content[:-9])
        with pytest.raises(InvalidInputError, match=name):
            open_artifact(made.path)
        (made.path / name).unlink()
        with pytest.raises(InvalidInputError, match=name):
            open_artifact(made.path)
        (made.path / name).write_bytes(content)


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    rewrite(made.path, schema=SCHEMA + 1)
    with pytest.raises(InvalidInputError, match=r"newer qdeploy.*upgrade"):
        open_artifact(made.path)


def test_an_unknown_kind_and_an_unwelcome_one_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    with pytest.raises(InvalidInputError, match="'checkpoint', but 'onnx or engine'"):
        open_artifact(made.path, "onnx", "engine")
    rewrite(made.path, kind="sculpture")
    with pytest.raises(InvalidInputError, match="sculpture"):
        open_artifact(made.path)


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest as if it had been written so."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest["integrity"] = sha256_of({key: value for key, value in manifest.items() if key != "integrity"})
    module.write_json(path / MANIFEST, manifest)


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"schema": "one", "kind": 1}', "\udcff"])
def test_nonsense_in_place_of_a_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    made = make(tmp_path / "a")
    (made.path / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInputError):
        open_artifact(made.path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(InvalidInputError, match=MANIFEST):
        open_artifact(tmp_path)


# -- whole or not at all -----------------------------------------------------------------------------------


def test_nothing_is_at_the_output_before_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with draft(output) as work:
        work.tensors("weights.safetensors", lambda: {"x": torch.ones(2)})
        assert not output.exists()
        work.finish()
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
        fail_after_a_step(draft(output), counted)
    assert not output.exists()
    with draft(output) as work:
        work.step("one", counted)
    assert counted.calls == 1


def test_an_error_before_the_first_step_leaves_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), draft(tmp_path / "out"):
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
        with draft(output, **change) as work:
            work.step("one", counted)
    assert counted.calls == 4


def test_half_written_files_of_a_killed_process_are_not_taken_up(tmp_path: Path) -> None:
    output, counted = tmp_path / "out", Counted()
    with draft(output) as work:
        work.steps.joinpath(".one.safetensors.123").write_bytes(b"half")
        work.content.joinpath(".config.json.123").write_bytes(b"half")
        work.json("config.json", {})
    with draft(output) as work:
        assert torch.equal(work.step("one", counted)["x"], torch.arange(4))
        made = work.finish()
    assert set(files(made.path)) == {MANIFEST, "config.json"}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(file, fail)
    assert files(tmp_path) == {"file": b"old"}


SCRIPT = """
import sys, time, torch
from pathlib import Path
from qdeploy.draft import Draft

output, pause = Path(sys.argv[1]), float(sys.argv[2])
with Draft(output, "checkpoint", {"model": "a"}, None, 7) as draft:
    for number in range(3):
        def compute():
            print("computing", number, flush=True)
            time.sleep(pause if number == 2 else 0)
            return {"x": torch.full((4,), float(number))}
        draft.step(f"step-{number}", compute)
        draft.tensors(f"part-{number}.safetensors", lambda: draft.step(f"step-{number}", compute))
    print(draft.finish({"parts": 3}).sha256, flush=True)
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
    return Draft(output, "checkpoint", {"model": "a"}, None, 7)


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
    one, other = files(killed), files(tmp_path / "other")
    assert {**one, MANIFEST: b""} == {**other, MANIFEST: b""}


# -- two writers -------------------------------------------------------------------------------------------


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with draft(output) as first:
        first.step("one", Counted())
        with pytest.raises(UsageError, match="another process is writing"), draft(output):
            pytest.fail("both were let in")
        with draft(tmp_path / "elsewhere"):
            pass
        first.finish()
    open_artifact(output)


def test_a_lock_is_gone_with_its_holder(tmp_path: Path) -> None:
    for _ in range(3):
        with draft(tmp_path / "out") as work:
            work.step("one", Counted())


# -- what is there already ---------------------------------------------------------------------------------


def test_the_same_request_is_already_done(tmp_path: Path) -> None:
    made = make(tmp_path / "out")
    done = draft(tmp_path / "out").finished()
    assert done is not None
    assert done.manifest == made.manifest


def test_another_request_is_refused_and_overwrites_only_when_told(tmp_path: Path) -> None:
    first = make(tmp_path / "out")
    with pytest.raises(UsageError, match=r"another artifact.*--overwrite"):
        draft(tmp_path / "out", seed=4).finished()
    assert open_artifact(first.path).sha256 == first.sha256
    assert draft(tmp_path / "out", seed=4, overwrite=True).finished() is None
    second = make(tmp_path / "out", seed=4, overwrite=True)
    assert open_artifact(first.path).sha256 == second.sha256 != first.sha256


def test_overwriting_keeps_the_old_artifact_until_the_new_one_is_whole(tmp_path: Path) -> None:
    first = make(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fail_after_a_step(draft(tmp_path / "out", seed=4, overwrite=True), Counted())
    assert open_artifact(tmp_path / "out").sha256 == first.sha256


@pytest.mark.xfail(strict=True, reason="a damaged artifact has to be removed by hand so far")
@pytest.mark.parametrize("seed", [3, 4])
def test_a_damaged_artifact_can_be_made_again_when_told(tmp_path: Path, seed: int) -> None:
    """The message about damage says so: make it again."""
    made = make(tmp_path / "out")
    for name in files(made.path):
        (made.path / name).write_bytes(b"damaged")
        assert draft(tmp_path / "out", seed=seed, overwrite=True).finished() is None
        made = make(tmp_path / "out", seed=seed, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    file.write_text("precious")
    for output in (folder, file):
        with pytest.raises(UsageError, match="already exists"):
            draft(output, overwrite=overwrite).finished()
    assert files(tmp_path) == {"folder/thesis.tex": b"precious", "file": b"precious"}


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert draft(tmp_path / "out").finished() is None
    make(tmp_path / "out")
    open_artifact(tmp_path / "out")


# -- a system that refuses ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; skipped where mounting is not permitted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_explained_and_finished_steps_are_kept(small_disk: Path) -> None:
    output, counted = small_disk / "out", Counted()

    def fill() -> None:
        with draft(output) as work:
            work.step("one", counted)
            work.step("two", lambda: {"x": torch.zeros(200_000)})

    with pytest.raises(CapabilityError, match=r"no space left for .*out.*finished steps are kept"):
        fill()
    assert not output.exists()
    with draft(output) as work:
        work.step("one", counted)
        work.step("two", lambda: {"x": torch.zeros(10)})
        work.finish()
    assert counted.calls == 1
    open_artifact(output)


Write = Callable[[Draft], Any]
WRITES: dict[str, Write] = {
    "step": lambda work: work.step("two", Counted()),
    "tensors": lambda work: work.tensors("two.safetensors", Counted()),
    "json": lambda work: work.json("config.json", {}),
    "finish": lambda work: work.finish(),
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
        with draft(tmp_path / "out") as work:
            work.step("one", Counted())
            monkeypatch.setattr(module.os, "fsync", refuse)
            write(work)

    with pytest.raises(expected) as caught:
        work_on()
    assert str(tmp_path / "out") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), draft(tmp_path / "file" / "out"):
        pytest.fail("a file was taken for a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"), draft(tmp_path / "out"):
        pytest.fail("a forbidden folder was written to")


def test_errors_of_the_work_itself_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="mine"), draft(tmp_path / "out"):
        raise InvalidInputError("mine")


# -- what people get ---------------------------------------------------------------------------------------


def test_a_summary_says_what_was_written(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    assert made.summary(1.23456) == {
        "path": str(tmp_path / "a"),
        "kind": "checkpoint",
        "sha256": made.sha256,
        "seconds": 1.235,
    }
    assert (made.facts, made.recipe) == ({"layers": 4}, REQUEST["recipe"])
    assert made.file("config.json").is_file()


def test_the_time_it_took_is_noted(tmp_path: Path) -> None:
    before = time.perf_counter()
    made = make(tmp_path / "a")
    assert 0 <= made.manifest["measured"]["seconds"] <= time.perf_counter() - before + 0.001


def test_every_file_is_listed_with_its_hash(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    listed = read_manifest(made.path)["files"]
    assert set(listed) == set(files(made.path)) - {MANIFEST}
    assert all(sha256_file(made.path / name) == digest for name, digest in listed.items())
