"""One command from a model to a checked engine: what it stands for, and when it says that a bound is missed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.model.card import CARD
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.store.artifact import EngineFolder, open_artifact
from qdeploy.system.errors import InvalidInputError
from qdeploy.workflows import auto_steps, preflight

FEW = (
    "--steps", "4", "--scheduler", "ddim", "--calibration-samples", "2", "--samples", "2", "--rounds", "1",
    "--for", "openvino",
)  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = auto_steps.LADDERS["openvino"]
    monkeypatch.setitem(auto_steps.LADDERS, "openvino", (ladder[0], auto_steps.Rung("w8a8-minmax")))


@pytest.mark.slow
def test_one_command_makes_what_its_explanation_says(
    qdeploy: Callable[..., Result], ddpm: Path, tmp_path: Path
) -> None:
    explained = qdeploy("auto", ddpm, "-o", tmp_path / "by-hand", *FEW, "--explain")
    assert explained.exit_code == 0, explained.stderr
    assert not (tmp_path / "by-hand").exists()
    commands = [shlex.split(line) for line in explained.stdout.splitlines()]
    verbs = ["preflight", "collect", "calibrate", "export", "build-engine", "check"]
    assert [words[1] for words in commands[:6]] == verbs
    for words in commands[:4]:
        assert qdeploy(*words[1:]).exit_code == 0

    done = qdeploy("auto", ddpm, "-o", tmp_path / "auto", *FEW, "--min-psnr", "20", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert [attempt["recipe"] for attempt in result["attempts"]] == ["w8a8-minmax-cpu"]
    assert result["passed"]
    assert result["chosen"]["psnr_db"] > 20
    assert Path(result["report"]).read_text().startswith("<!doctype html>")
    for name in ("set", "w8a8-minmax-cpu", "w8a8-minmax-cpu-onnx"):
        by_hand, automatic = (open_artifact(tmp_path / place / name) for place in ("by-hand", "auto"))
        assert by_hand.sha256 == automatic.sha256


@pytest.mark.slow
def test_a_bound_that_no_recipe_meets_is_said_and_the_best_engine_is_kept(
    qdeploy: Callable[..., Result], ddpm: Path, tmp_path: Path
) -> None:
    done = qdeploy("auto", ddpm, "-o", tmp_path / "auto", *FEW, "--min-psnr", "100")
    assert done.exit_code == 3
    assert "PSNR" in done.stderr
    result = json.loads((tmp_path / "auto" / "auto.json").read_text())
    assert [attempt["recipe"] for attempt in result["attempts"]] == ["w8a8-minmax-cpu", "w8a8-minmax"]
    assert result["chosen"]["psnr_db"] == max(attempt["psnr_db"] for attempt in result["attempts"])
    assert open_artifact(result["engine"], EngineFolder).facts.component == "unet"


@pytest.mark.slow
def test_of_a_whole_pipeline_it_makes_a_pipeline_folder(
    qdeploy: Callable[..., Result], stable_diffusion: Path, tmp_path: Path
) -> None:
    done = qdeploy(
        "auto", stable_diffusion, "-o", tmp_path / "auto", *FEW, "--min-psnr", "1", "--prompt", "a cat"
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "auto" / "auto.json").read_text())
    assert result["pipeline"] is True
    assert f'qdeploy.load_pipeline("{result["engine"]}")' in done.stdout
    pipeline = load_pipeline(result["engine"])
    assert type(pipeline.text_encoder).__name__ == "EngineTextEncoder"
    (code,) = re.findall(r"```python\n(.*?)```", (Path(result["engine"]) / CARD).read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("this-folder", result["engine"]), names)
    assert type(names["pipe"]) is type(pipeline)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--min-psnr", "-3"), 2, "the least PSNR"),
        (("--for", "abacus"), 2, "unknown backend"),
        (("--steps", "0"), 2, "steps must be at least 1"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    words: tuple[str, ...], code: int, said: str, qdeploy: Callable[..., Result], ddpm: Path, tmp_path: Path
) -> None:
    done = qdeploy("auto", ddpm, "-o", tmp_path / "auto", *words)
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "auto").exists()


def test_a_pipeline_that_needs_prompts_says_so(
    qdeploy: Callable[..., Result], stable_diffusion: Path, tmp_path: Path
) -> None:
    done = qdeploy("auto", stable_diffusion, "-o", tmp_path / "auto")
    assert done.exit_code == 2
    assert "needs prompts" in done.stderr


def test_a_model_that_preflight_refuses_costs_no_calibration(
    qdeploy: Callable[..., Result], ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise InvalidInputError("this network branches on its input")

    monkeypatch.setattr(preflight, "trace", refuse)
    done = qdeploy("auto", ddpm, "-o", tmp_path / "auto", *FEW)
    assert done.exit_code == 5
    assert re.search(r"trace into ONNX +fails", done.stderr)
    assert done.stderr.splitlines()[-1] == "qdeploy: this network branches on its input"
    assert not (tmp_path / "auto").exists()
