"""The grammar of the command line: one word for one thing, defaults in one place, errors that help."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

import qdeploy as qd
from qdeploy.calibration_set.collect import collect
from qdeploy.cli import main
from qdeploy.commands import calibration, deployment, evaluation, information, models
from qdeploy.commands.calibration import stage_options
from qdeploy.commands.options import Verb
from qdeploy.commands.signature import REQUIRED
from qdeploy.model.sampling import Sampling
from qdeploy.recipe.stages import make_stage
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import UsageError

Run = Callable[..., Result]
VERBS = [
    value
    for module in (calibration, deployment, evaluation, information, models)
    for value in vars(module).values()
    if isinstance(value, Verb)
]
SAMPLED = ("collect", "sample", "check", "report")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.function)
def test_what_is_read_from_the_source_is_the_signature(verb: Verb) -> None:
    real = inspect.signature(inspect.unwrap(getattr(import_module(verb.module), verb.function))).parameters
    assert verb.parameters.keys() <= real.keys()
    for name, parameter in verb.parameters.items():
        default = inspect.Parameter.empty if parameter.default is REQUIRED else parameter.default
        assert real[name].default == default
        assert real[name].annotation == parameter.annotation


def test_a_default_may_be_a_constant_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "LEAST = 3\ndef work(a: int, *, c: float = unknown): ...\ndef fine(b: int = LEAST): ..."
    (tmp_path / "some_verb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert Verb("some_verb", "fine").parameters["b"].default == 3
    with pytest.raises(LookupError, match="the default unknown cannot be read"):
        assert Verb("some_verb", "work").parameters
    with pytest.raises(LookupError, match="no function nothing"):
        assert Verb("some_verb", "nothing").parameters


def options(verb: str) -> dict[str, click.Option]:
    return {
        flag: each
        for each in main.commands[verb].params
        if isinstance(each, click.Option) and not each.hidden
        for flag in each.opts
    }


def test_every_option_shows_the_default_that_holds() -> None:
    shown = options("check")["--keep"].help
    assert shown is not None
    assert "[default: 20]" in shown


@pytest.mark.parametrize("verb", SAMPLED)
def test_verbs_that_sample_share_the_words_of_sampling(verb: str) -> None:
    words = {f"--{each.name}" for each in fields(Sampling) if "help" in each.metadata}
    assert words | {"--prompt", "--negative-prompt", "--samples", "-n"} <= options(verb).keys()
    assert "Sampling steps" in str(options(verb)["--steps"].help)


def test_a_word_takes_values_of_one_type_everywhere() -> None:
    types: dict[str, set[str]] = {}
    for verb in main.commands:
        for flag, option in options(verb).items():
            types.setdefault(flag, set()).add(option.type.name)
    assert {flag for flag, found in types.items() if len(found) > 1} == set()


# -- stages' options ---------------------------------------------------------------------------------------


def test_options_of_stages_are_set_with_values_as_yaml_writes_them() -> None:
    given = ["round-weights.steps=5000", "round-weights.lr=1e-3", "weight-ranges.finder=lp", "x.check=false"]
    assert stage_options(given) == {
        "round-weights": {"steps": 5000, "lr": "1e-3"},
        "weight-ranges": {"finder": "lp"},
        "x": {"check": False},
    }


def test_numbers_are_read_in_every_way_that_people_write_them() -> None:
    """YAML 1.1 takes ``1e-3`` for a word."""
    assert make_stage("round-weights", {"lr": "1e-3", "weight": "0.5"}) == qd.AdaRound(lr=0.001, weight=0.5)
    with pytest.raises(UsageError, match="a number, not 'fast'"):
        make_stage("round-weights", {"lr": "fast"})


@pytest.mark.parametrize("text", ["", "steps=3", "round-weights.steps", ".=", "a.b=[", "=3"])
def test_what_sets_no_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        stage_options([text])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("activation-ranges.finder=magic", "magic"),
        ("activation-ranges.findr=lp", "did you mean 'finder'?"),
        ("activation-ranges.channelwise=3", "true or false, not 3"),
        ("align-end.reach=2", "no stage 'align-end'"),
    ],
)
def test_impossible_options_of_stages_are_refused(
    qdeploy: Run, tmp_path: Path, given: str, words: str
) -> None:
    result = qdeploy("calibrate", "digits", "-o", tmp_path / "out", "-r", "w8a8-minmax", "--set", given)
    assert result.exit_code == 2
    assert words in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


# -- prompts -----------------------------------------------------------------------------------------------


def test_prompts_can_be_written_on_the_command_line(
    qdeploy: Run, stable_diffusion: Path, tmp_path: Path
) -> None:
    few = ("--steps", 2, "-n", 2, "--guidance", 3)
    words = ("--prompt", "a cat", "--prompt", "a dog")
    made = {}
    for name, more in (("plain", ()), ("negative", ("--negative-prompt", "a dog"))):
        result = qdeploy("sample", stable_diffusion, "-o", tmp_path / name, *few, *words, *more, "--json")
        assert result.exit_code == 0, result.stderr
        made[name] = json.loads(result.stdout)["sha256"]
    assert made["plain"] != made["negative"]
    facts = json.loads(qdeploy("inspect", tmp_path / "negative", "--json").stdout)["facts"]
    assert facts["prompts"] == ["a cat", "a dog"]
    assert facts["negative_prompts"] == ["a dog"]


def test_prompts_are_named_in_one_way(qdeploy: Run, stable_diffusion: Path, tmp_path: Path) -> None:
    result = qdeploy(
        "sample",
        stable_diffusion,
        "-o",
        tmp_path / "x",
        "--prompt",
        "a cat",
        "--prompts",
        tmp_path / "file.txt",
    )
    assert result.exit_code == 2
    assert "both name prompts" in result.stderr


# -- words of the version before ---------------------------------------------------------------------------


def test_old_words_still_work_with_a_warning(ddpm: Path, tmp_path: Path, qdeploy: Run) -> None:
    new = collect(ddpm, tmp_path / "new", samples=2, keep=2, steps=4)
    old: dict[str, Any] = {"steps": 2, "inference_steps": 4}
    with pytest.warns(DeprecationWarning, match="inference_steps is now called steps"):
        again = collect(ddpm, tmp_path / "old", samples=2, **old)
    assert again.sha256 == new.sha256
    result = qdeploy(
        "collect", ddpm, "-o", tmp_path / "cli", "-n", 2, "--steps", 2, "--inference-steps", 4, "--json"
    )
    assert json.loads(result.stdout)["sha256"] == new.sha256
    assert "now called --steps" in result.stderr
    with pytest.warns(DeprecationWarning, match="count is now called samples"):
        made = sample(ddpm, tmp_path / "images", steps=2, **{"count": 3})  # type: ignore[arg-type]
    assert len(list(made.path.glob("0*.png"))) == 3


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("inspect", "scens"), 5, "did you mean 'scenes'?"),
        (("calibrate", "digits", "-r", "w8a8-minmx"), 2, "did you mean 'w8a8-minmax'?"),
        (("calibrate", "digits", "--method", "tfmk"), 2, "did you mean 'tfmq'?"),
        (("doctor", "--require", "opnvino"), 2, "did you mean 'openvino'?"),
        (("calibrat", "digits"), 2, "did you mean 'calibrate'?"),
        (("collect", "digits"), 2, "Missing option"),
        (("collect", "digits", "-o", "x", "--steps", "many"), 2, "not a valid integer"),
    ],
)
def test_errors_name_the_nearest_word_and_are_json_when_json_is_asked_for(
    qdeploy: Run, command: tuple[str, ...], code: int, words: str
) -> None:
    result = qdeploy(*command, "--json")
    assert result.exit_code == code
    said = json.loads(result.stdout)
    assert said["exit_code"] == code
    assert words in said["error"]
    plain = qdeploy(*command)
    assert plain.stdout == ""
    assert words in plain.stderr


# -- conveniences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("qdeploy calib", "calibrate"),
        ("qdeploy calibrate dig", "digits-dit"),
        ("qdeploy calibrate digits -r w8a8-minmax-", "w8a8-minmax-cpu"),
        ("qdeploy calibrate digits --eff", "--effort"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_presets_and_models(
    shell: str, words: str, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split()
    monkeypatch.setenv("_QDEPLOY_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", words if shell != "fish" else " ".join(given[:-1]))
    monkeypatch.setenv("COMP_CWORD", str(len(given) - 1) if shell != "fish" else given[-1])
    with pytest.raises(SystemExit):
        main.main(args=[], prog_name="qdeploy")
    assert found in capsys.readouterr().out


def test_a_shipped_model_has_prompts_and_there_is_an_image_for_each(qdeploy: Run, tmp_path: Path) -> None:
    few = ("--steps", 1, "--batch", 16)
    result = qdeploy("sample", "scenes", "-o", tmp_path / "own", *few, "--prompt", "a red circle")
    assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "own").glob("0*.png"))) == 1
    result = qdeploy("sample", "scenes", "-o", tmp_path / "shipped", *few)
    assert "the 16 that it comes with" in result.stderr
    facts = json.loads(qdeploy("inspect", tmp_path / "shipped", "--json").stdout)["facts"]
    assert facts["count"] == len(facts["prompts"]) == 16


def test_an_engine_says_what_was_measured(qdeploy: Run, ddpm: Path, tmp_path: Path) -> None:
    qdeploy("export", ddpm, "-o", tmp_path / "onnx")
    plain = qdeploy("build-engine", tmp_path / "onnx", "-o", tmp_path / "engine", "--threads", 1)
    assert re.search(
        r"ms a call with 1 sample .*MB, 0% of the multiplications in int8, [\d.]+ dB", plain.stdout
    )
    assert (
        "median"
        in json.loads(
            qdeploy(
                "build-engine", tmp_path / "onnx", "-o", tmp_path / "engine", "--threads", 1, "--json"
            ).stdout
        )["measured"]["ms"]
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tfmq", "2024"),
        ("round-weights", "steps"),
        ("w8a8-qdiffusion", "SQNR 47.7 dB"),
        ("int4b64", "block"),
        ("openvino", "asymmetric"),
        ("fast", "rows"),
    ],
)
def test_a_word_of_recipes_is_explained(qdeploy: Run, name: str, words: str) -> None:
    result = qdeploy("methods", name)
    assert result.exit_code == 0
    assert words in result.stdout
    assert json.loads(qdeploy("methods", name, "--json").stdout)["name"] == name


def test_words_that_are_unknown_or_two_questions_at_once_are_refused(qdeploy: Run) -> None:
    result = qdeploy("methods", "tfmk")
    assert result.exit_code == 2
    assert "did you mean 'tfmq'?" in result.stderr
    assert qdeploy("methods", "tfmq", "--which", "cpu").exit_code == 2
    assert "w8a8-minmax-cpu" in qdeploy("methods", "--which", "unet cpu fast").stdout


@pytest.mark.slow
def test_artifacts_are_shown_in_notebooks_and_in_a_terminal_of_100_columns(
    qdeploy: Run, ddpm_engine: Artifact, ddpm: Path, tmp_path: Path
) -> None:
    assert "<td>backend</td><td>openvino</td>" in ddpm_engine._repr_html_()
    images = sample(ddpm, tmp_path / "<images>", steps=1, samples=1)
    assert "data:image/png;base64" in images._repr_html_()
    assert "<images>" not in images._repr_html_()
    shown = qdeploy("inspect", ddpm_engine.path).stdout.splitlines()
    assert "intact" in shown[0]
    assert not any("{" in line for line in shown)
    assert max(map(len, shown[1:])) <= 100
