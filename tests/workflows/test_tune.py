"""The search for scheduler, steps and precision: what it chooses among trials, what it refuses, that it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.system.errors import UsageError
from qdeploy.workflows import tune_steps
from qdeploy.workflows.tune import frontier, promising, tune
from qdeploy.workflows.tune_steps import Trial
from tests.models.pipelines import stable_diffusion_folder

MEASURED = st.lists(st.tuples(st.floats(0.01, 10), st.floats(5, 100)), min_size=1, max_size=20)


def trials_of(pairs: list[tuple[float, float]]) -> list[Trial]:
    return [
        Trial("engine", "float", "ddim", number, psnr, seconds)
        for number, (seconds, psnr) in enumerate(pairs, 1)
    ]


@given(MEASURED)
def test_the_frontier_is_what_nothing_dominates(pairs: list[tuple[float, float]]) -> None:
    trials = trials_of(pairs)
    found = frontier(trials)

    def dominated(each: Trial) -> bool:
        return any(
            other.seconds <= each.seconds
            and other.psnr_db >= each.psnr_db
            and (other.seconds, other.psnr_db) != (each.seconds, each.psnr_db)
            for other in trials
        )

    assert {(each.seconds, each.psnr_db) for each in found} == {
        (each.seconds, each.psnr_db) for each in trials if not dominated(each)
    }
    assert list(found) == sorted(found, key=lambda each: each.seconds)


def test_schedules_below_the_bound_are_not_quantized_unless_there_are_no_others() -> None:
    trials = trials_of([(1, 20), (2, 36), (3, 41), (4, 40)])
    assert [each.steps for each in promising(trials, 35)] == [2, 3]
    assert [each.steps for each in promising(trials, 60)] == [3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_psnr": 0}, "from 0 to 100"),
        ({"try_steps": [0]}, "at least 1"),
        ({"try_steps": [200]}, "raise --reference-steps"),
        ({"schedulers": ["nosuch"]}, "unknown scheduler 'nosuch'"),
        ({"samples": 0}, "one image"),
    ],
)
def test_impossible_wishes_are_one_sentence(
    ddpm: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        tune(ddpm, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_pipeline_is_tuned_and_a_second_run_measures_nothing(
    qdeploy: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stable_diffusion_folder(tmp_path / "model", vae_channels=(8, 8))
    asked = [
        "tune", model, "-o", tmp_path / "out", "--min-psnr", "10", "--try-scheduler", "ddim", "--try-scheduler",
        "dpm++", "--try-steps", "2", "--try-steps", "4", "--reference-steps", "8", "--steps", "4", "-n", "2",
        "--calibration-samples", "2", "--for", "openvino", "--prompt", "a cat", "--json",
    ]  # fmt: skip
    done = qdeploy(*asked)
    assert done.exit_code == 0, done.stderr
    assert "steps of the denoiser" in done.stderr
    result = json.loads(done.stdout)
    forms = {trial["form"] for trial in result["trials"]}
    assert {"float", "int8"} <= forms
    good = [trial for trial in result["trials"] if trial["psnr_db"] >= 10]
    assert result["chosen"] == min(good, key=lambda trial: trial["seconds"])
    assert result["chosen"] in result["frontier"]
    for trial in result["trials"]:
        assert (Path(trial["engine"]) / "qdeploy.json").is_file()

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(tune_steps, "_measured", never)
    again = qdeploy(*asked)
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout) == result
    missed = qdeploy(*[{"10": "99"}.get(str(word), word) for word in asked])
    assert missed.exit_code == 3
    assert "no trial has a PSNR of 99 dB" in missed.stderr
