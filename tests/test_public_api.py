"""The Python interface: what type checkers, ``help`` and plain calls see of it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
from safetensors.torch import load_file

import qdeploy as qd
from qdeploy.model.folder import open_model
from qdeploy.model.in_memory import model_of
from qdeploy.model.sampling import Sampling, SamplingOptions
from qdeploy.recipe.stages import stages
from qdeploy.system.errors import InvalidInputError, UsageError

ROOT = Path(__file__).parent.parent
PYTHON = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def checked_by_mypy(folder: Path, code: str) -> str:
    """What ``mypy --strict`` says of a reader's own file."""
    (folder / "reader.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "reader.py"]
    command += ["--untyped-calls-exclude", "diffusers"]  # which has no types of its own
    environment = {
        **os.environ,
        "MYPYPATH": str(ROOT),
        "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache" / "readers"),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.slow
def test_a_type_checker_passes_the_readme_and_flags_what_does_not_exist(tmp_path: Path) -> None:
    assert PYTHON is not None
    # Of overloads, mypy names the word or the function.
    wrong = {
        'qdeploy.collect("x", "y", bogus=3)': 'bogus|No overload variant of "collect"',
        'qdeploy.calibrate("x", recipe="y", effort=3)': 'arg-type|No overload variant of "calibrate"',
        'qdeploy.calibrate("x", sensitiviti="y")': 'sensitiviti|No overload variant of "calibrate"',
        "qdeploy.AdaRound(reach=1.0)": "reach",
        'qdeploy.Recipe("int4", stages=[3])': "list-item",
        'qdeploy.sample("x", steps="many")': "arg-type",
        'qdeploy.build_engine("x", workspaces=2.0)': "workspaces",
    }
    right = [
        "reveal_type(checkpoint)",
        'qdeploy.calibrate("x", dry_run=True).seconds',
        'qdeploy.Recipe("int4", "int8", stages=[qdeploy.WeightRanges("lp"), qdeploy.AdaRound(steps=5000)])',
        'qdeploy.collect("x", "y", qdeploy.Sampling(steps=50), keep=20)',
    ]
    lines = [*PYTHON[1].splitlines(), *right, *wrong]
    said = checked_by_mypy(tmp_path, "\n".join(lines) + "\n")
    assert 'Revealed type is "qdeploy.store.artifact.Checkpoint"' in said
    found = {int(n): text for n, text in re.findall(r"reader\.py:(\d+): error: (.*)", said)}
    assert found.keys() == {lines.index(line) + 1 for line in wrong}, said
    for line, word in wrong.items():
        assert re.search(word, found[lines.index(line) + 1])


@pytest.mark.slow
def test_the_readme_runs(stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines as they stand, on a small model of the same class and with little work."""
    assert PYTHON is not None
    code = PYTHON[1]
    for theirs, ours in (
        ('"sd15/"', repr(str(stable_diffusion))),
        ("samples=64", "samples=2, steps=3, keep=2"),
        ("w4a8-gptq", "w8a8-minmax"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    images = namespace["pipe"]("a lighthouse", num_inference_steps=2, guidance_scale=7.5).images
    assert len(images) == 1
    assert {"sd15-set", "sd15-w4a8", "sd15-w4a8-onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_signatures_and_help_show_real_parameters() -> None:
    shown = inspect.signature(qd.calibrate).parameters
    assert {"model", "output", "recipe", "stages", "calibration", "dry_run"} <= shown.keys()
    assert not [each for each in shown.values() if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    collect = inspect.signature(qd.collect).parameters
    assert collect["steps"].default == 100
    assert collect["keep"].default == 20
    assert inspect.signature(qd.check).parameters["seed"].default == 1


@pytest.mark.parametrize("name", [name for name in qd.__all__ if not name.startswith("_")])
def test_every_public_name_is_there_and_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(qd, name))


def test_a_function_stays_what_its_name_means_when_its_namesake_folder_is_imported() -> None:

    assert inspect.isfunction(qd.calibrate)
    assert inspect.isfunction(qd.export)


def test_every_stage_has_a_public_name() -> None:
    assert {kind.__name__ for kind in stages().values()} <= set(qd.__all__)


def test_keyword_arguments_of_sampling_are_its_fields() -> None:
    assert SamplingOptions.__annotations__.keys() == inspect.signature(Sampling).parameters.keys()
    with pytest.raises(TypeError, match="bogus"):
        qd.collect("digits", "never", bogus=3)  # type: ignore[call-overload]


# -- recipes -----------------------------------------------------------------------------------------------

STAGES = [qd.WeightRanges("lp"), qd.AdaRound(steps=5000), qd.ActivationRanges("percentile")]


def test_a_recipe_is_the_same_in_python_and_yaml(tmp_path: Path) -> None:
    from qdeploy.recipe.resolve import resolve_recipe

    (tmp_path / "own.yaml").write_text(
        "weights: int4\nstages:\n  - weight-ranges: {finder: lp}\n  - round-weights: {steps: 5000}\n"
        "  - activation-ranges: {finder: percentile}\n"
    )
    recipe = qd.Recipe("int4", "int8", stages=STAGES)
    assert resolve_recipe(tmp_path / "own.yaml") == recipe
    plain = ["weight-ranges", "round-weights", ("activation-ranges", {"finder": "percentile"})]
    set_later = resolve_recipe(
        weights="int4",
        stages=plain,
        options={"weight-ranges": {"finder": "lp"}, "round-weights": {"steps": 5000}},
    )
    assert set_later == recipe
    assert qd.Recipe.from_json(recipe.to_json()) == recipe


def test_what_an_option_leaves_to_the_effort_is_not_in_the_recipe() -> None:
    """So that recipes from before there was the option keep their identity."""
    (written,) = qd.Recipe(stages=[qd.WeightRanges(), qd.AdaRound()]).to_json()["stages"][1:]
    assert written == {"round-weights": {"weight": 0.01, "warmup": 0.2, "lr": 0.0}}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: qd.Recipe(stages=[("round-weights", {"reach": 1.0})]),
            "'round-weights' has no option 'reach'",
        ),
        (lambda: qd.Recipe(stages=[qd.AdaRound()]), "needs weight scales"),
        (lambda: qd.Recipe(stages=[3]), "a stage is a name"),
        (lambda: qd.Recipe("int44"), r"unknown number format 'int44' \(did you mean 'int4'\?\)"),
        (lambda: qd.Recipe(method="tfmk"), r"unknown method 'tfmk' \(did you mean 'tfmq'\?\)"),
        (lambda: qd.AdaRound(steps=0), "at least 1"),
        (lambda: qd.AdaRound(steps=2.5), "a whole number or none, not 2.5"),
        (lambda: qd.AlignEnd(reach="far"), "a number, not 'far'"),
        (lambda: qd.WeightRanges("magic"), "magic"),
        (lambda: qd.Sampling(steps=0), "steps must be at least 1"),
        (lambda: qd.Sampling(prompts=["a"], negative_prompts=["b", "c"]), "give one, or as many"),
    ],
)
def test_impossible_objects_are_refused_when_they_are_made(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_stage_that_no_installed_package_has_can_be_read_and_not_run() -> None:
    value = {**qd.Recipe().to_json(), "stages": [{"of-another-package": {"speed": 3}}]}
    recipe = qd.Recipe.from_json(value)
    assert recipe.to_json() == value
    with pytest.raises(UsageError, match="no installed package has a stage 'of-another-package'"):
        recipe.stages[0].run(None)  # type: ignore[arg-type]


# -- models in memory --------------------------------------------------------------------------------------


def test_calibrate_takes_recipes_stages_networks_and_pipelines(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four calls that once were refused; all of them make the same checkpoint."""
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    pipeline = diffusers.DDPMPipeline.from_pretrained(ddpm)
    data = qd.collect(pipeline, tmp_path / "set", samples=4, keep=2, steps=4)
    found = [qd.WeightRanges("lp"), qd.ActivationRanges()]
    made = [
        qd.calibrate(ddpm, tmp_path / "a", recipe=qd.Recipe(stages=found), calibration=data),
        qd.calibrate(ddpm, tmp_path / "b", stages=found, calibration=data),
        qd.calibrate(open_model(ddpm), tmp_path / "c", stages=found, calibration=data),
        qd.calibrate(pipeline, tmp_path / "d", stages=found, calibration=data),
    ]
    assert len({checkpoint.sha256 for checkpoint in made}) == 1
    assert not (tmp_path / "cache" / "models").exists()


def test_a_network_that_was_changed_in_memory_is_what_is_calibrated(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    network = diffusers.UNet2DModel.from_pretrained(ddpm / "unet")
    network.conv_out.bias.data.add_(0.5)
    model = model_of(network)
    assert model.path.is_relative_to(tmp_path / "cache")
    (weights,) = model.weights
    assert load_file(weights)["conv_out.bias"].equal(network.conv_out.bias)
    assert model_of(network).path == model.path
    assert model_of(diffusers.UNet2DModel.from_pretrained(ddpm / "unet")).folder == ddpm / "unet"


@pytest.mark.slow
def test_other_verbs_take_pipelines_in_memory(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export`, `sample`, `sensitivity` and `check` do with a loaded pipeline what they do with its folder."""
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path / "cache"))
    pipeline = diffusers.DDPMPipeline.from_pretrained(ddpm)
    bundle = qd.export(pipeline, tmp_path / "onnx")
    assert bundle.sha256 == qd.export(ddpm, tmp_path / "same-onnx").sha256
    images = qd.sample(pipeline, tmp_path / "images", samples=1, steps=2)
    assert images.sha256 == qd.sample(ddpm, tmp_path / "same-images", samples=1, steps=2).sha256
    data = qd.collect(pipeline, tmp_path / "set", samples=4, keep=2, steps=4)
    cost = qd.sensitivity(pipeline, calibration=data, rows=2, cheap=True, dry_run=True)
    assert cost.seconds > 0
    checked = qd.check(bundle, reference=pipeline, samples=1, keep=1, steps=2)
    assert checked.quality["sqnr_db"]["median"] > 80
    pipeline.unet.conv_out.bias.data.add_(0.5)
    with pytest.raises(InvalidInputError, match="was not made from"):
        qd.check(bundle, reference=pipeline, samples=1, keep=1, steps=2)


def test_what_is_no_model_is_refused() -> None:
    from torch import nn

    with pytest.raises(InvalidInputError, match="a Linear is no diffusers pipeline or network"):
        model_of(nn.Linear(2, 2))
