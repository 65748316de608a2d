"""A check passes or fails by its thresholds, and says which one and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from qdeploy.evaluate.check import check
from qdeploy.evaluate.thresholds import THRESHOLDS, look_up, parity_floor, rows_out_of_parity
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.evaluate.conftest import Way
from tests.models import ddpm_folder

Run = Callable[..., Result]
FEW: dict[str, Any] = {"samples": 4, "keep": 3, "steps": 5}
OPTIONS = ("--samples", 4, "--steps", 3, "--inference-steps", 5)


def test_the_json_object_has_the_promised_keys(way: Way) -> None:
    value = json.loads(json.dumps(check(way.engine, reference=way.model, **FEW).to_json(), allow_nan=False))
    assert value["passed"] is True
    assert {"sqnr_db", "max_abs"} <= value["parity"].keys()
    assert {"sqnr_db", "psnr_db", "drift"} <= value["quality"].keys()
    assert value["quality"]["sqnr_db"].keys() == {"median", "worst", "by_timestep"}
    assert len(value["quality"]["sqnr_db"]["by_timestep"]) == 3
    assert value["thresholds"].keys() == {threshold.name for threshold in THRESHOLDS}


def test_without_a_reference_quality_is_that_of_the_probe(way: Way) -> None:
    result = check(way.engine)
    assert result.passed
    assert result.quality["source"] == "probe"
    assert "psnr_db" not in result.quality
    assert "--reference" in result.table()


@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "engine"])
def test_every_stage_can_be_checked(way: Way, kind: str) -> None:
    result = check(getattr(way, kind), reference=way.model, **FEW)
    assert result.passed, result.failures
    assert result.to_json()["kind"] == kind


@pytest.mark.slow
def test_speed_is_a_bound_where_it_is_asked_for(way: Way, full_bundle: Artifact) -> None:
    assert "speed was not compared" in check(way.engine).table()
    with pytest.raises(UsageError, match="--min-speedup bounds"):
        check(way.engine, min_speedup=1.0)
    with pytest.raises(UsageError, match="an engine that is quantized"):
        check(full_bundle, reference=way.model, min_speedup=1.0)
    with pytest.raises(UsageError, match="positive number"):
        check(way.engine, reference=way.model, min_speedup=float("nan"))


def test_full_precision_is_held_against_itself(way: Way, full_bundle: Artifact) -> None:
    result = check(full_bundle, reference=way.model, **FEW)
    assert result.passed
    assert result.parity["expected"] == "reference"
    assert result.parity["sqnr_db"] > 100
    assert result.quality["sqnr_db"]["worst"] > 100
    assert result.quality["psnr_db"] > 90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"min_parity": 500.0}, "parity in dB"),
        ({"min_sqnr": 500.0}, "median SQNR"),
        ({"min_psnr": 500.0}, "PSNR"),
        ({"min_speedup": 500.0}, "speed compared with the 16-bit engine"),
    ],
)
def test_a_missed_threshold_is_named(way: Way, bound: dict[str, float], words: str) -> None:
    result = check(way.engine, reference=way.model, **FEW, **bound)
    assert not result.passed
    assert len(result.failures) == 1
    assert words in result.failures[0]
    assert "below 500" in result.failures[0]
    assert result.failures[0] in result.table()


def test_bounds_on_what_is_not_measured_are_refused(way: Way) -> None:
    with pytest.raises(UsageError, match="--min-psnr"):
        check(way.engine, min_psnr=20)
    with pytest.raises(UsageError, match="--max-fd-increase"):
        check(way.engine, reference=way.model, max_fd_increase=1)


def test_another_model_is_no_reference(way: Way, tmp_path: Path) -> None:
    other = ddpm_folder(tmp_path / "other", seed=1)
    with pytest.raises(InvalidInputError, match="was not made from"):
        check(way.engine, reference=other, **FEW)


def test_what_is_no_stage_of_the_way_is_refused(way: Way, tmp_path: Path) -> None:
    data = way.checkpoint.path.parent / "set"
    with pytest.raises(InvalidInputError, match="calibration-set"):
        check(data)


def test_the_command_exits_with_3_where_a_threshold_is_missed(qdeploy: Run, way: Way) -> None:
    passing = qdeploy("check", way.engine.path, "--reference", way.model, *OPTIONS, "--json")
    assert passing.exit_code == 0, passing.stderr
    assert json.loads(passing.stdout)["passed"] is True
    failing = qdeploy("check", way.engine.path, "--min-sqnr", 500, "--json")
    assert failing.exit_code == 3
    assert json.loads(failing.stdout)["passed"] is False
    assert "median SQNR" in failing.stderr


def parity(backend: str, floor: float, rows: list[float]) -> dict[str, Any]:
    return {
        "backend": backend,
        "rounding_floor_db": floor,
        "by_row_db": rows,
        "floors_db": [floor] * len(rows),
        "timesteps": [str(number) for number in range(len(rows))],
    }


def test_the_parity_floor_is_absolute_until_rounding_bounds_it() -> None:
    assert parity_floor(parity("onnxruntime", 60, [])) == 45
    assert parity_floor(parity("openvino", 60, [])) == 40
    assert parity_floor(parity("openvino", 30, [])) == 27


def test_rows_beyond_rounding_are_told_worst_first() -> None:
    told = list(rows_out_of_parity(parity("openvino", 30, [31, 25, 20, 10])))
    assert [sentence.split()[3] for sentence in told] == ["3", "2"]
    assert not list(rows_out_of_parity(parity("openvino", 90, [35])))


def test_values_are_looked_up_by_keys() -> None:
    result = {"quality": {"sqnr_db": {"median": 3}}}
    assert look_up(result, ("quality", "sqnr_db", "median")) == 3
    assert look_up(result, ("quality", "psnr_db")) is None


def test_artifacts_and_paths_are_taken_alike(way: Way) -> None:
    assert isinstance(way.engine, Artifact)
    assert check(str(way.engine.path)).parity == check(way.engine).parity
