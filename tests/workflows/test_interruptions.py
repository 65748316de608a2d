"""Stopped at any step's boundary, by a kill or a loss of power: the next run ends in the same artifact.

Where another artifact is replaced, it is there until the new one is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.export.run import export
from qdeploy.mixed.sensitivity import sensitivity
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact, open_artifact
from qdeploy.workflows.calibrate import calibrate
from tests.engines.bundles import write_bundle
from tests.helpers import small_artifact, small_draft, some_facts
from tests.interruptions import Moments

Verb = Callable[[Path, bool], Any]


def check_moments(verb: Verb, folder: Path, copies: Path, power: bool) -> int:
    """Make an artifact where another one is or is not, and make it again from every moment."""
    old = open_artifact(folder / "out").sha256 if (folder / "out").exists() else None
    moments = Moments(folder, copies, power)
    with moments.watch():
        new = verb(folder / "out", old is not None).sha256
    assert new != old
    for moment in moments.found:
        output = moment / "out"
        if output.exists():
            assert open_artifact(output).sha256 in (old, new)
        elif old is not None:
            assert open_artifact(moment / ".out.work" / "replaced").sha256 == old
        assert verb(output, old is not None).sha256 == new
        assert open_artifact(output).sha256 == new
        assert {path.name for path in moment.iterdir()} == {"out"}
    return len(moments.found)


# -- drafts ------------------------------------------------------------------------------------------------


def make_in_steps(output: Path, overwrite: bool) -> Artifact:
    """An artifact of steps of every kind, and a file that a library writes without a sync."""
    draft = small_draft(output, seed=5, overwrite=overwrite)
    if done := draft.finished():
        return done
    with draft:
        first = draft.step("first", lambda: {"x": torch.arange(4.0)})
        second, value = draft.step_with_value("second", lambda: ({"x": first["x"] + 1}, {"sum": 6.0}))
        for number in range(3):
            kept = draft.saved("long")
            start = 0 if kept is None else int(kept["done"])
            if start <= number:
                draft.save("long", {"done": torch.tensor(number + 1)})
        draft.forget("long")
        draft.tensors("part/weights.safetensors", lambda: {"x": second["x"] * value["sum"]})
        draft.json("config.json", value)
        (draft.content / "model.bin").write_bytes(b"graph")
        return draft.finish(some_facts())


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_draft_is_made_or_taken_up_from_every_moment(tmp_path: Path, power: bool, overwrite: bool) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    if overwrite:
        small_artifact(folder / "out")
    assert check_moments(make_in_steps, folder, tmp_path, power) >= 12


def test_the_name_of_what_is_finished_is_synced(tmp_path: Path) -> None:
    """A file system may lose a rename until the folder is synced: it is, before the verb returns."""
    folder = tmp_path / "made"
    folder.mkdir()
    moments = Moments(folder, tmp_path, power=True)
    with moments.watch():
        make_in_steps(folder / "out", False)
    assert folder.stat().st_ino in moments.synced_folders


# -- verbs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verbs(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verb]:
    made = tmp_path_factory.mktemp("made")
    data = collect(ddpm, made / "set", keep=2, samples=2, steps=3)
    recipe: dict[str, Any] = {"calibration": data, "weights": "int8", "activations": "int8", "effort": "fast"}
    checkpoint = calibrate(ddpm, made / "checkpoint", **recipe)
    bundle = write_bundle(made / "bundle")
    formats = ["int8", "int4"]
    return {
        "collect": lambda o, w: collect(ddpm, o, keep=2, samples=2, steps=3, overwrite=w),
        "calibrate": lambda o, w: calibrate(ddpm, o, overwrite=w, **recipe),
        "sensitivity": lambda o, w: sensitivity(
            ddpm, o, calibration=data, formats=formats, rows=2, probes=1, cheap=True, overwrite=w
        ),
        "export": lambda o, w: export(checkpoint, o, overwrite=w),
        "build-engine": lambda o, w: build_engine(bundle, o, threads=1, overwrite=w),
        "sample": lambda o, w: sample(ddpm, o, samples=2, steps=2, batch=1, overwrite=w),
    }


@pytest.mark.slow
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("verb", ["collect", "calibrate", "sensitivity", "export", "build-engine", "sample"])
def test_a_verb_takes_up_its_work_from_every_moment(
    verbs: dict[str, Verb], verb: str, power: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    if power:  # where another artifact is replaced, too
        small_artifact(folder / "out")
    assert check_moments(verbs[verb], folder, tmp_path, power) >= 3
