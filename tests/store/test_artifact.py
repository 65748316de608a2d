"""Artifacts: the same for the same content and request, and any damage is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qdeploy.store.artifact import Bundle, EngineFolder, open_artifact
from qdeploy.store.manifest import MANIFEST, SCHEMA, Notes, read_manifest
from qdeploy.store.measured import CheckpointMeasured
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file, sha256_files, sha256_of
from tests.helpers import REQUEST, files_in, reseal, small_artifact, some_facts

# -- identity ----------------------------------------------------------------------------------------------


def test_equal_content_made_in_the_same_way_has_an_equal_hash(tmp_path: Path) -> None:
    first, second = small_artifact(tmp_path / "a"), small_artifact(tmp_path / "b" / "c")
    assert first.sha256 == second.sha256
    assert open_artifact(first.path).manifest == first.manifest


def test_measurements_and_notes_are_not_part_of_the_identity(tmp_path: Path) -> None:
    plain = small_artifact(tmp_path / "a")
    took = CheckpointMeasured(seconds=1e6, stage_seconds={"0-round": 1.5})
    noted = small_artifact(tmp_path / "b", measured=took, notes=Notes(source="/somewhere"))
    assert plain.sha256 == noted.sha256
    assert plain.manifest != noted.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"content": 2.0},
        {"facts": some_facts(layers=5)},
        {"seed": 4},
        {"made_from": {"model": "b" * 64}},
        {"recipe": {"method": "lp", "seed": 3}},
        {"kind": Bundle},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_determines_the_content_is_part_of_it(tmp_path: Path, change: dict[str, Any]) -> None:
    assert small_artifact(tmp_path / "a").sha256 != small_artifact(tmp_path / "b", **change).sha256


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_of({"a": 1, "b": {"c": 2, "d": 3}}) == sha256_of({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_hash_of_files_depends_on_names_and_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1"), two.write_bytes(b"2")
    assert sha256_files({"x": one, "y": two}) == sha256_files({"y": two, "x": one})
    assert sha256_files({"x": one, "y": two}) != sha256_files({"x": two, "y": one})
    assert sha256_file(one) != sha256_file(two)


def test_every_file_is_listed_with_its_hash(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    listed = read_manifest(made.path).files
    assert set(listed) == set(files_in(made.path)) - {MANIFEST}
    assert all(sha256_file(made.path / name) == digest for name, digest in listed.items())


def test_a_summary_says_what_was_written(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    assert made.summary(1.23456) == {
        "path": str(tmp_path / "a"),
        "kind": "checkpoint",
        "sha256": made.sha256,
        "seconds": 1.235,
    }
    assert (made.facts, made.recipe) == (some_facts(layers=4), REQUEST["recipe"])
    assert made.file("config.json").is_file()


# -- damage ------------------------------------------------------------------------------------------------


def says_the_same(damaged: bytes, content: bytes) -> bool:
    """Whether two texts are one JSON value."""
    try:
        return bool(json.loads(damaged) == json.loads(content))
    except ValueError:
        return False


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One bit of each byte of each file, the manifest's own included."""
    made = small_artifact(tmp_path / "a", notes=Notes(source="/über/ß"))
    for name, content in files_in(made.path).items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            if name == MANIFEST and says_the_same(damaged, content):
                continue  # an e of 1e-05 turned into an E
            (made.path / name).write_bytes(damaged)
            with pytest.raises(InvalidInputError):
                open_artifact(made.path)
        (made.path / name).write_bytes(content)
    open_artifact(made.path)


def test_truncated_and_missing_files_are_found_and_named(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    for name, content in files_in(made.path).items():
        (made.path / name).write_bytes(content[:-9])
        with pytest.raises(InvalidInputError, match=name):
            open_artifact(made.path)
        (made.path / name).unlink()
        with pytest.raises(InvalidInputError, match=name):
            open_artifact(made.path)
        (made.path / name).write_bytes(content)


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    rewrite(made.path, schema=SCHEMA + 1)
    with pytest.raises(InvalidInputError, match=r"newer qdeploy.*upgrade"):
        open_artifact(made.path)


def test_an_unknown_kind_and_an_unwelcome_one_are_refused(tmp_path: Path) -> None:
    made = small_artifact(tmp_path / "a")
    with pytest.raises(InvalidInputError, match="'checkpoint', but 'onnx or engine'"):
        open_artifact(made.path, Bundle, EngineFolder)
    rewrite(made.path, kind="sculpture")
    with pytest.raises(InvalidInputError, match="sculpture"):
        open_artifact(made.path)


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest as if it had been written so."""
    reseal(path, lambda manifest: manifest.update(changes))


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"schema": "one", "kind": 1}', "\udcff"])
def test_nonsense_in_place_of_a_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    made = small_artifact(tmp_path / "a")
    (made.path / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInputError):
        open_artifact(made.path)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(InvalidInputError, match=MANIFEST):
        open_artifact(tmp_path)
