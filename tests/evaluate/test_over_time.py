"""A check shows time: pictures of ranges and error, and the error of an earlier try beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from qdeploy.calibration_set.collect import collect
from qdeploy.evaluate.check import check
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError
from qdeploy.workflows.calibrate import calibrate
from tests.evaluate.conftest import Way
from tests.models import ddpm_folder

Run = Callable[..., Result]
FEW: dict[str, Any] = {"samples": 4, "keep": 3, "steps": 5}


@pytest.fixture(scope="module")
def four_bits(way: Way) -> Artifact:
    folder = way.checkpoint.path.parent
    options: dict[str, Any] = {"recipe": "w8a8-minmax", "effort": "fast", "calibration": folder / "set"}
    checkpoint = calibrate(way.model, folder / "w4a8", weights="int4", **options)
    assert isinstance(checkpoint, Artifact)
    return checkpoint


def test_bundle_and_engine_carry_the_ranges_of_their_checkpoint(way: Way) -> None:
    name = "unet/ranges.safetensors"
    expected = way.checkpoint.file(name).read_bytes()
    assert way.onnx.file(name).read_bytes() == way.engine.file(name).read_bytes() == expected
    assert name in way.engine.files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "engine"])
def test_every_stage_can_be_drawn_with_and_without_a_reference(way: Way, kind: str, tmp_path: Path) -> None:
    for reference in (None, way.model):
        folder = tmp_path / str(reference is None)
        result = check(getattr(way, kind), reference=reference, pictures=folder, **FEW)
        assert result.to_json()["pictures"] == [str(folder / "ranges.png"), str(folder / "error.png")]
        for picture in result.pictures:
            with Image.open(picture) as image:
                image.load()
                assert image.format == "PNG"
                assert min(image.size) > 100


def test_full_precision_has_no_ranges_and_says_so(
    full_bundle: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = check(full_bundle, pictures=tmp_path)
    assert [picture.name for picture in result.pictures] == ["error.png"]
    assert "--checkpoint" in capsys.readouterr().err


def test_without_pictures_there_are_none(way: Way) -> None:
    value = check(way.checkpoint).to_json()
    assert value["pictures"] == []
    assert value["before"] is None


@pytest.mark.parametrize("with_reference", [True, False])
def test_before_and_after_are_measured_on_the_same_inputs(
    way: Way, four_bits: Artifact, tmp_path: Path, with_reference: bool
) -> None:
    reference = way.model if with_reference else None
    result = check(way.engine, reference=reference, before=four_bits, pictures=tmp_path, **FEW)
    assert result.before is not None
    before, after = result.before["sqnr_db"], result.quality["sqnr_db"]
    assert before["by_timestep"].keys() == after["by_timestep"].keys()
    assert before["median"] < after["median"], "4 bits are worse than 8"
    assert result.before["sha256"] == four_bits.sha256
    lines = [line.split() for line in result.table().splitlines()]
    for t in after["by_timestep"]:
        (row,) = [line for line in lines if line[:1] == [t]]
        one, other, gain = map(float, row[1:])
        assert (one, other) == (before["by_timestep"][t], after["by_timestep"][t])
        assert gain == pytest.approx(other - one, abs=0.011)
    alone = check(four_bits, reference=reference, **FEW)
    if with_reference:
        assert alone.quality["sqnr_db"] == before


def test_nothing_is_gained_over_itself(way: Way) -> None:
    result = check(way.checkpoint, before=way.checkpoint)
    assert result.before is not None
    assert result.before["sqnr_db"] == result.quality["sqnr_db"]
    assert result.passed


def test_bad_input_is_refused_in_one_sentence(way: Way, qdeploy: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    other = ddpm_folder(tmp_path / "other", seed=1)
    data = collect(other, tmp_path / "set", samples=2, keep=2, steps=2)
    assert isinstance(data, Artifact)
    foreign = calibrate(other, tmp_path / "foreign", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(foreign, Artifact)
    for arguments, code, words in (
        (("--pictures", tmp_path / "file"), 2, "is a file"),
        (("--pictures", tmp_path / "file" / "below"), 2, "cannot be written"),
        (("--before", foreign.path), 5, "another model"),
        (("--before", data.path), 5, "calibration-set"),
        (("--before", tmp_path / "nothing"), 5, "does not exist"),
    ):
        result = qdeploy("check", way.checkpoint.path, *arguments)
        assert result.exit_code == code, result.stderr
        assert words in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_command_writes_both_pictures(way: Way, qdeploy: Run, tmp_path: Path) -> None:
    options = ("--before", way.checkpoint.path, "--pictures", tmp_path / "pictures")
    result = qdeploy("check", way.engine.path, *options, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert all(Path(picture).is_file() for picture in value["pictures"])
    assert len(value["pictures"]) == 2
    assert value["before"]["kind"] == "checkpoint"
    assert "pictures: " in qdeploy("check", way.engine.path, *options).stdout


def test_damaged_ranges_are_found(way: Way, tmp_path: Path) -> None:
    copy = shutil.copytree(way.engine.path, tmp_path / "engine")
    (copy / "unet" / "ranges.safetensors").write_bytes(b"spoilt")
    with pytest.raises(InvalidInputError, match="recorded hash"):
        check(copy, pictures=tmp_path / "pictures")
