"""Recipes: resolved and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qdeploy.recipe.effort import EFFORTS, find_effort
from qdeploy.recipe.formats import FORMATS
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import presets, resolve_recipe
from qdeploy.recipe.stages import methods, stages
from qdeploy.recipe.targets import TARGETS
from qdeploy.system.errors import InvalidInputError, UsageError

NVFP4: dict[str, Any] = {"weights": "nvfp4", "activations": "nvfp4", "target": "tensorrt"}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("preset", presets())
def test_every_preset_resolves_and_survives_json(preset: str) -> None:
    recipe = resolve_recipe(preset)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("preset", presets())
def test_a_preset_has_a_description_and_is_named_by_its_precision(preset: str) -> None:
    recipe = resolve_recipe(preset)
    assert presets()[preset]
    precision = recipe.precision.lower().replace("afp", "a32")
    if recipe.target == "tensorrt" and recipe.weights.startswith(
        ("fp8", "nvfp4", "int4b")
    ):  # another kind of format: its name says more than bits
        assert preset.startswith(recipe.weights.partition("b")[0])
        return
    if recipe.weights.startswith("int8b") or recipe.unblocked != "none":  # named by what it is good for
        assert preset.startswith(f"w{FORMATS[recipe.weights].bits}-")
        return
    assert preset.startswith(f"{precision}-{recipe.method}")


@pytest.mark.parametrize("preset", presets())
def test_only_what_is_simulated_has_no_engine(preset: str) -> None:
    recipe = resolve_recipe(preset)
    assert bool(recipe.simulated()) == (not TARGETS[recipe.target].backends)


def test_what_the_caller_gives_goes_before_the_preset() -> None:
    recipe = resolve_recipe("w8a8-minmax", weights="int4", seed=5, effort=None)
    assert (recipe.weights, recipe.seed) == ("int4", 5)
    assert recipe.effort == resolve_recipe("w8a8-minmax").effort


def test_another_method_brings_its_own_stages() -> None:
    recipe = resolve_recipe("w8a8-minmax", method="qdiffusion")
    assert recipe.stages == tuple(methods()["qdiffusion"].stages)


def test_a_resolved_recipe_states_every_option_of_every_stage() -> None:
    for name in methods():
        for written in resolve_recipe(method=name).to_json()["stages"]:
            ((stage, options),) = written.items()
            decided = {key for key, value in stages()[stage].defaults().items() if value is not None}
            assert options.keys() == decided


def test_stages_of_several_papers_combine(tmp_path: Path) -> None:
    own = written(
        tmp_path / "own.yaml",
        "method: minmax\nweights: int4\nstages:\n  - weight-ranges: {finder: lp}\n  - round-weights\n"
        "  - activation-ranges:\n      finder: percentile\n",
    )
    recipe = resolve_recipe(own)
    assert [stage.name for stage in recipe.stages] == ["weight-ranges", "round-weights", "activation-ranges"]
    assert recipe.stages[2].options == {"finder": "percentile", "channelwise": False}


@pytest.mark.parametrize(
    "given",
    [
        {"method": "magic"},
        {"weights": "int2"},
        {"activations": "int3"},
        {"coverage": "everything"},
        {"target": "abacus"},
        {"effort": "heroic"},
        {"stages": (("weight-ranges", {"finder": "lp", "speed": 3}),)},
        {"stages": (("unknown", {}),)},
        {"activations": "int4"},  # no kernel
        {"activations": "uint8"},  # not on every engine
        {"weights": "uint8"},  # asymmetric eight bits do not fit an int8 kernel
        {"coverage": "qdiffusion-paper", "target": "portable"},
        {"weights": "none", "activations": "none"},
        {"weights": "none"},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe(**given)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "- a list\n", "weights: [", "speed: 3\n", "stages: [[1]]\n", "seed: soon\n"], ids=repr
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInputError):
        resolve_recipe(written(tmp_path / "bad.yaml", text))


@pytest.mark.parametrize(
    "text",
    [
        "stages: 3\n",
        "stages: {round-weights: {lr: 1}}\n",
        "exclude: 3\n",
        "exclude: mid*\n",
        "weights: [8]\n",
    ],
    ids=repr,
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, text: str) -> None:
    """``exclude: mid*`` taken letter by letter would exclude ``*``, which is every layer."""
    with pytest.raises((InvalidInputError, UsageError)):
        resolve_recipe(written(tmp_path / "bad.yaml", text))


def test_a_missing_file_and_an_unknown_preset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"gone\.yaml"):
        resolve_recipe(tmp_path / "gone.yaml")
    with pytest.raises(UsageError, match="w8a8-minmax"):
        resolve_recipe("w1a1")


def test_a_misspelled_entry_is_refused_with_the_entry_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"unknown entry of the recipe 'metod' \(did you mean 'method'\?\)"
    ):
        resolve_recipe(written(tmp_path / "bad.yaml", "metod: qdiffusion"))


def test_unsigned_activations_run_where_the_target_says_so() -> None:
    for target in ("openvino", "onnxruntime"):
        assert not resolve_recipe(activations="uint8", target=target).simulated()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"weights": "fp8", "activations": "fp8"},
            "target portable cannot run fp8 weights: .*--target tensorrt",
        ),
        (
            {"weights": "int4b32", "activations": "none", "target": "tensorrt"},
            "cannot run int4b32 weights: .*--target ",
        ),
        ({"weights": "int4b64", "activations": "int8", "target": "openvino"}, "int8-dynamic or none"),
        (
            {"weights": "int8", "activations": "int8-dynamic", "target": "openvino"},
            "in front of weights in blocks only, not of int8: choose weights such as int4b64",
        ),
        (
            {"weights": "int4b64", "activations": "int8-dynamic", "target": "tensorrt"},
            "cannot run int8-dynamic activations: .*--target ",
        ),
        (
            {"weights": "int8", "unblocked": "int8", "target": "openvino"},
            "'unblocked' is for weights in blocks, and weights are 'int8'",
        ),
        (
            {"weights": "int4b64", "activations": "none", "unblocked": "int4b32", "target": "openvino"},
            "cannot have int4b32 weights: choose int8, or none",
        ),
        (
            {"weights": "int4b64", "activations": "int8-dynamic", "timestep_groups": 2, "target": "openvino"},
            "calibrated activation scales, and activations are 'int8-dynamic'",
        ),
        ({"weights": "fp8", "activations": "fp8", "target": "simulated"}, "--target tensorrt"),
        ({"weights": "int4b64", "activations": "int8", "target": "tensorrt"}, "choose --activations none"),
        ({"weights": "int8", "activations": "fp8", "target": "tensorrt"}, "both in fp8"),
        ({"weights": "fp8", "activations": "none", "target": "tensorrt"}, "both in fp8"),
        (
            {"weights": "fp8", "activations": "fp8", "target": "tensorrt", "method": "tfmq"},
            "stage temporal-rounding needs equal steps.*choose --method minmax or qdiffusion",
        ),
        ({"weights": "nvfp4", "activations": "nvfp4"}, "cannot run nvfp4 weights: .*--target tensorrt"),
        ({"weights": "nvfp4", "activations": "fp8", "target": "tensorrt"}, "nvfp4 needs both in nvfp4"),
        ({"weights": "nvfp4", "activations": "none", "target": "tensorrt"}, "nvfp4 needs both in nvfp4"),
        (NVFP4 | {"timestep_groups": 4}, "timestep groups have no use with nvfp4"),
        (NVFP4 | {"unblocked": "int4"}, "cannot have int4 weights: choose fp8, int8, or none"),
        (
            {"weights": "int4b64", "activations": "none", "unblocked": "fp8", "target": "tensorrt"},
            "choose int8, or",
        ),
    ],
)
def test_formats_that_do_not_go_together_are_refused_in_a_sentence(given: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        resolve_recipe(None, **given)
    assert "\n" not in str(refused.value)


def test_low_bits_of_tensorrt_are_no_simulation() -> None:
    for preset in ("int4-weights", "int4-awq", "fp8-minmax", "nvfp4-minmax"):
        assert resolve_recipe(preset).simulated() == []
    assert resolve_recipe("fp8-minmax").precision == "Wf8Af8"
    assert resolve_recipe("nvfp4-minmax").precision == "Wf4g16Af4g16"
    assert resolve_recipe("int4-weights").precision == "W4g128Afp"


def test_numbers_of_an_effort_can_be_replaced() -> None:
    effort = find_effort("fast,rows=5120,batch=8, rounding=20000,scales=5000,tuning=7")
    assert (effort.rows, effort.batch, effort.rounding, effort.scales, effort.tuning) == (
        5120,
        8,
        20000,
        5000,
        7,
    )
    assert find_effort("fast") is EFFORTS["fast"]
    assert Recipe(effort="best,rows=64").to_json()["effort"] == "best,rows=64"


@pytest.mark.parametrize(
    "effort", ["5120", "fast,5120", "fast,rows=0", "fast,rows=x", "fast,row=3", "fast,name=x"]
)
def test_impossible_numbers_of_an_effort(effort: str) -> None:
    with pytest.raises(UsageError):
        Recipe(effort=effort)


def test_the_softmax_output_has_a_format_where_attention_is_quantized() -> None:
    recipe = Recipe(coverage="portable-attention", softmax="none")
    assert (recipe.probabilities, recipe.simulated()) == (None, [])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe(coverage="portable-attention", softmax="uint16").simulated()
    for wrong in ({"softmax": "uint3", "coverage": "portable-attention"}, {"softmax": "none"}):
        with pytest.raises(UsageError):
            Recipe(**wrong)


@pytest.mark.parametrize(("word", "given"), [("weights", []), ("activations", False), ("target", 10**20)])
def test_an_artifacts_recipe_of_other_types_is_refused(word: str, given: object) -> None:
    with pytest.raises(InvalidInputError, match=f"the recipe's {word} must be one word"):
        Recipe.from_json({**resolve_recipe("w8a8-minmax").to_json(), word: given})
