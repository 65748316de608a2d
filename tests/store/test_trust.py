"""What a hostile folder asks for is refused: nothing outside of it is read, nothing out of range."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import Model
from qdeploy.model.pipeline_index import files_of, read_index
from qdeploy.quant.checkpoint import copy_pipeline_files
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store import builder, paths
from qdeploy.store.artifact import KINDS, Bundle, CalibrationFolder, Checkpoint, EngineFolder, open_artifact
from qdeploy.store.bounded_json import parse_json, read_json_object
from qdeploy.store.bounded_yaml import parse_yaml
from qdeploy.store.manifest import MANIFEST
from qdeploy.store.names import contained, name_problem
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from tests.helpers import reseal, small_artifact, small_draft, some_facts

Change = Callable[[dict[str, Any]], object]


# -- names (rows 2, 3 and 5) -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../b", "", "a//b", "./a", "C:/x", "a\\b", "con", "a\nb", "x" * 300],
)
def test_a_name_that_leads_out_or_fits_no_system_is_refused(tmp_path: Path, name: str) -> None:
    assert name_problem(name)
    made = small_artifact(tmp_path / "a")
    reseal(made.path, lambda manifest: manifest["files"].update({name: "0" * 64}))
    with pytest.raises(InvalidInputError, match=r"lists a file|is not as it should be"):
        open_artifact(made.path)


@pytest.mark.parametrize("component", ["../../x", "/tmp", "unet/../..", "", "unet\n", "Unet"])
def test_a_component_is_a_plain_name(tmp_path: Path, component: str) -> None:
    made = small_artifact(tmp_path / "a")
    reseal(made.path, lambda manifest: manifest["facts"].update(component=component))
    with pytest.raises(InvalidInputError, match=r"\$\.component"):
        open_artifact(made.path)


def test_a_link_that_leads_out_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    content = (made.path / "config.json").read_bytes()
    (tmp_path / "secret").write_bytes(content)
    (made.path / "config.json").unlink()
    (made.path / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInputError, match="link to outside"):
        open_artifact(made.path)
    (made.path / ".kept").write_bytes(content)
    (made.path / "config.json").unlink()
    (made.path / "config.json").symlink_to(".kept")
    open_artifact(made.path)


def test_a_snapshot_in_the_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0f3a"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate((*made.files, MANIFEST)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.path / name, blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert open_artifact(snapshot).sha256 == made.sha256
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="link to outside"):
        open_artifact(snapshot)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="regular file"):
        contained(tmp_path, "pipe")


# -- files beside those of the manifest (row 6) ------------------------------------------------------------


def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    extra = made.path / "part" / "rows-99999.safetensors"
    shutil.copy(made.file("part/weights.safetensors"), extra)
    with pytest.raises(InvalidInputError, match=r"part/rows-99999\.safetensors is not listed"):
        open_artifact(made.path)
    extra.unlink()
    extra.symlink_to("weights.safetensors")
    with pytest.raises(InvalidInputError, match="is not listed"):
        open_artifact(made.path)


def test_texts_for_people_hidden_files_and_the_picture_may_lie_there(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    for name in ("README.md", "LICENSE", ".gitattributes", "ranges.png", ".git/config"):
        (made.path / name).parent.mkdir(exist_ok=True)
        (made.path / name).write_text("text")
    open_artifact(made.path)


def test_only_listed_files_can_be_had(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    (made.path / "README.md").write_text("text")
    assert made.find("README.md") is None
    with pytest.raises(InvalidInputError, match=r"has no file README\.md"):
        made.file("README.md")


def test_a_shard_that_is_not_listed_is_no_part_of_a_set(tmp_path: Path) -> None:
    with small_draft(tmp_path / "set", kind=CalibrationFolder) as draft:
        made = draft.finish(some_facts(CalibrationFolder))
    (made.path / "rows-00000.safetensors").write_bytes(b"")
    assert made.shards == []
    with pytest.raises(InvalidInputError, match="is not listed"):
        CalibrationSet.open(made.path)


# -- content of manifests (row 13) -------------------------------------------------------------------------

CHANGES: dict[str, Change] = {
    "a missing fact": lambda m: m["facts"].pop("weights"),
    "an added fact": lambda m: m["facts"].update(extra=1),
    "a fact of another type": lambda m: m["facts"].update(layers="4"),
    "a fact out of range": lambda m: m["facts"].update(layers=-1),
    "no facts": lambda m: m.update(facts=None),
    "an added entry": lambda m: m.update(extra=1),
    "a missing entry": lambda m: m.pop("made_from"),
    "a seed of 20 digits": lambda m: m.update(seed=10**20),
    "a negative seed": lambda m: m.update(seed=-1),
    "files as a list": lambda m: m.update(files=[]),
    "a hash of another form": lambda m: m["made_from"].update(model="short"),
    "a schema of 0": lambda m: m.update(schema=0),
    "a schema as text": lambda m: m.update(schema="1"),
    "a class that is no name": lambda m: m["facts"].update({"class": "os.system"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_is_not_as_stated_is_refused_in_one_sentence(tmp_path: Path, change: Change) -> None:
    made = small_artifact(tmp_path / "a")
    reseal(made.path, change)
    with pytest.raises(InvalidInputError) as refused:
        open_artifact(made.path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a": 1e999}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"",
    ],
)
def test_json_out_of_bounds_is_an_error_of_values(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any message: callers name the file
        parse_json(content)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "[" * 200 + "]" * 200,
        "a: .inf",
        "a: 1.0e+999",
        "a: [",
        "- " * 600_000,
        "!!python/name:os.system x",
    ],
)
def test_yaml_out_of_bounds_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InvalidInputError, match="cannot be read as a recipe") as refused:
        resolve_recipe(tmp_path / "recipe.yaml")
    assert len(str(refused.value).splitlines()) == 1


def test_a_bomb_of_aliases_takes_neither_time_nor_memory() -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
    with pytest.raises(ValueError, match="alias"):
        parse_yaml("a0: &a0 [1]\n" + levels)


def test_an_identity_that_is_not_that_of_the_content_is_refused(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    file = made.path / MANIFEST
    reseal(made.path)
    forged = json.loads(file.read_text()) | {"sha256": "f" * 64}
    from qdeploy.system.hashing import sha256_of

    forged["integrity"] = sha256_of({key: item for key, item in forged.items() if key != "integrity"})
    file.write_text(json.dumps(forged))
    with pytest.raises(InvalidInputError, match="sha256 is not that of its content"):
        open_artifact(made.path)


@pytest.mark.parametrize("kind", [Checkpoint, Bundle, EngineFolder, CalibrationFolder])
def test_every_kind_opens_as_its_class_with_the_facts_it_was_given(tmp_path: Path, kind: Any) -> None:
    facts = some_facts(kind)
    with small_draft(tmp_path / "a", kind=kind) as draft:
        draft.finish(facts)
    found = open_artifact(tmp_path / "a", kind)
    assert type(found) is kind is KINDS[found.kind]
    assert found.facts == facts


# -- pipelines (rows 4 and 5) ------------------------------------------------------------------------------


def pipeline(folder: Path, **components: list[str]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **components}))
    return folder


@pytest.mark.parametrize(
    "entry", [["evil", "Evil"], ["os", "system"], ["diffusers", "utils"], ["torch", "load"]]
)
def test_nothing_but_networks_of_two_libraries_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: list[str]
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a model folder ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    index = read_index(pipeline(tmp_path / "model", vae=entry))
    assert index is not None
    with pytest.raises(InvalidInputError, match="only networks of diffusers and transformers"):
        index.components["vae"].find_class()


def test_a_link_in_a_scheduler_or_tokenizer_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("private")
    folder = pipeline(tmp_path / "model", scheduler=["diffusers", "DDIMScheduler"])
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir()
        (folder / name / "config.json").symlink_to(tmp_path / "secret.json")
        with pytest.raises(InvalidInputError, match="link to outside"):
            files_of(folder, name)
    with small_draft(tmp_path / "out") as draft, pytest.raises(InvalidInputError, match="link to outside"):
        copy_pipeline_files(draft, Model(folder, "unet").path)


# -- drafts (rows 7, 8, 9, 11 and 14) ----------------------------------------------------------------------


def stop_after(draft: Any, work: Callable[[Any], object]) -> None:
    """Work on a draft, and be stopped before it is finished."""
    with draft:
        work(draft)
        raise ZeroDivisionError


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, lambda file: file.write_bytes(file.read_bytes()[:-3])], ids=["flip", "cut"]
)
@pytest.mark.parametrize("kept", ["steps/one.safetensors", "content/part.safetensors"])
def test_a_damaged_step_is_made_again(tmp_path: Path, damage: Callable[[Path], Any], kept: str) -> None:
    def work(draft: Any, value: float) -> float:
        step = draft.step("one", lambda: {"x": torch.full((8,), value)})
        return float(draft.tensors("part.safetensors", lambda: step)["x"][-1])

    with pytest.raises(ZeroDivisionError):
        stop_after(small_draft(tmp_path / "out"), lambda draft: work(draft, 1.0))
    damage(tmp_path / ".out.work" / kept)
    with small_draft(tmp_path / "out") as draft:
        assert work(draft, 1.0) == 1.0
        made = draft.finish(some_facts())
    assert made.sha256 == clean(tmp_path / "clean", work).sha256


def clean(output: Path, work: Callable[[Any, float], float]) -> Any:
    with small_draft(output) as draft:
        work(draft, 1.0)
        return draft.finish(some_facts())


def test_a_step_gives_back_the_value_that_it_had(tmp_path: Path) -> None:
    """A resumed calibration reports what an uninterrupted one does."""
    with pytest.raises(ZeroDivisionError):
        stop_after(
            small_draft(tmp_path / "out"),
            lambda draft: draft.step_with_value("one", lambda: ({"x": torch.ones(2)}, {"layers": 5})),
        )

    def again() -> Any:
        raise AssertionError("computed twice")

    with small_draft(tmp_path / "out") as draft:
        tensors, value = draft.step_with_value("one", again)
    assert value == {"layers": 5}
    assert torch.equal(tensors["x"], torch.ones(2))


def test_seconds_add_up_over_stops(tmp_path: Path) -> None:
    def slow(draft: Any) -> None:
        draft.time.label("first")
        draft.time._since -= 100  # as if it had taken so long
        draft.step("one", lambda: {"x": torch.ones(2)})

    with pytest.raises(ZeroDivisionError):
        stop_after(small_draft(tmp_path / "out"), slow)
    with small_draft(tmp_path / "out") as draft:
        assert draft.time is not None
        assert draft.time.by_label()["first"] >= 100
        assert draft.finish(some_facts()).measured.seconds >= 100


def test_a_replacement_that_is_killed_between_its_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_artifact(tmp_path / "out")
    real, renames = os.rename, []

    def rename(source: Any, target: Any) -> None:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(builder.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            small_artifact(tmp_path / "out", seed=4, overwrite=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="another artifact"):
        small_draft(tmp_path / "out", seed=4).finished()
    assert open_artifact(tmp_path / "out").sha256 == first.sha256
    assert small_artifact(tmp_path / "out", seed=4, overwrite=True).seed == 4


def test_a_link_as_output_or_as_work_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match="symbolic link"):
        small_draft(tmp_path / "out").finished()
    (tmp_path / ".new.work").symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match="symbolic link"), small_draft(tmp_path / "new"):
        pass
    assert not list((tmp_path / "there").iterdir())


def test_too_little_space_is_found_before_any_work(tmp_path: Path) -> None:
    expected = pytest.raises(CapabilityError, match=r"no space left for .*out: it takes about")
    with expected, small_draft(tmp_path / "out", space=2**60):
        pytest.fail("work has begun")


def test_a_runtime_that_fails_on_a_full_disk_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "is_full", lambda output: True)

    def fail(draft: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    with pytest.raises(CapabilityError, match="no space left"):
        stop_after(small_draft(tmp_path / "out"), fail)


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made = small_artifact(tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in made.path.rglob("*") if file.is_file()} == {0o644}


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    assert paths.cache_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(UsageError, match="can be written to by others"):
        paths.cache_folder()
    (tmp_path / "cache").chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UsageError, match="belongs to another user"):
        paths.cache_folder()


def test_infinities_are_taken_from_schedulers_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json_object(file, infinities=True) == {"lambda_min_clipped": -math.inf}
    with pytest.raises(InvalidInputError, match="-Infinity is no number"):
        read_json_object(file)
    file.write_text('{"lambda_min_clipped": NaN}')
    with pytest.raises(InvalidInputError, match="NaN is no number"):
        read_json_object(file, infinities=True)
