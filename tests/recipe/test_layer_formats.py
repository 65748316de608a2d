"""Layers with formats of their own: what a recipe says, what a network gets, what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdeploy.network.roles import find_structure
from qdeploy.quant.insert import quantize_structure
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.packing import packed_bytes
from qdeploy.quant.state import read_state
from qdeploy.recipe.formats import FORMATS
from qdeploy.recipe.layer_formats import parse_overrides
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.helpers import MemoryRows, calibrating, tiny_unet

LAYERS = """
weights: int4
activations: int8
layers:
  - "down_blocks.*": {weights: int8}
  - "down_blocks.0.*conv1": {weights: int3, activations: none}
  - "mid_block.*": {weights: none}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "own.yaml").write_text(LAYERS)
    return resolve_recipe(tmp_path / "own.yaml")


def test_later_patterns_stand_above_earlier_ones(recipe: Recipe) -> None:
    def names(path: str) -> list[str]:
        return [each.name if each else "none" for each in recipe.formats(path)]

    assert names("up_blocks.0.resnets.0.conv1") == ["int4", "int8"]
    assert names("down_blocks.1.resnets.0.conv1") == ["int8", "int8"]
    assert names("down_blocks.0.resnets.0.conv1") == ["int3", "none"]
    assert names("mid_block.resnets.0.conv1") == ["none", "none"]
    assert recipe.precision == "W3-8A8"


def test_a_recipe_survives_its_json_and_one_without_layers_says_nothing_of_them(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "layers" not in resolve_recipe("w4a8-minmax").to_json()


def test_a_mapping_means_the_same_as_a_list() -> None:
    as_list = parse_overrides([{"a.*": {"weights": "int8"}}, {"b": {"activations": "none"}}])
    assert parse_overrides({"a.*": {"weights": "int8"}, "b": {"activations": "none"}}) == as_list


@pytest.mark.parametrize(
    "given",
    [3, "mid*", [3], [{"a": {"weights": "int8"}, "b": {}}], {"a": {}}, {"a": {"bits": "4"}}, {"a": 4}],
)
def test_entries_of_another_kind_are_refused(given: Any) -> None:
    with pytest.raises(InvalidInputError) as refused:
        parse_overrides(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("formats", [{"weights": "uint8"}, {"weights": "int9"}, {"activations": "int4"}])
def test_formats_of_layers_are_checked_like_those_of_recipes(formats: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        resolve_recipe(None, layers=[{"mid*": formats}])


def test_a_pattern_that_means_no_layer_is_refused() -> None:
    network, data = tiny_unet(), MemoryRows.noisy()
    structure = find_structure(network, data.inputs([0]))
    with pytest.raises(UsageError, match=r"'midblock\.\*'.*no layer"):
        quantize_structure(
            network, structure, resolve_recipe(None, layers={"midblock.*": {"weights": "int4"}})
        )


def test_layers_get_their_formats_and_their_codes_take_as_many_bits(tmp_path: Path, recipe: Recipe) -> None:
    chosen = {"weights": recipe.weights, "activations": recipe.activations, "layers": recipe.layers}
    with calibrating(tiny_unet(), MemoryRows.noisy(), tmp_path / "c", **chosen) as session:
        for stage in session.recipe.stages:
            stage.run(session)
        layers = quantized_layers(session.denoiser)
        assert set(session.left.values()) <= {"as the recipe says"}
        assert not any(path.startswith("mid_block") for path in layers)
        for path, layer in layers.items():
            assert layer.formats == recipe.formats(path)
            for quantizer, weight in layer.weight_pairs():
                quantizer.codes = quantizer.nearest(weight)
        state = read_state(session.denoiser)
        for path, layer in layers.items():
            number_format = layer.formats[0]
            assert number_format is not None
            for part, weight in enumerate(layer.weight_parts()):
                stored = state[f"{path}.weight.{part}.codes"]
                assert stored.nbytes == packed_bytes(weight.numel(), number_format)


def test_layers_of_one_tensor_share_a_quantizer_only_if_their_formats_agree() -> None:
    """A query whose input stays in float must not take the quantizer away from key and value."""
    network, data = tiny_unet(), MemoryRows.noisy()
    structure = find_structure(network, data.inputs([0]))
    query = next(layer.path for layer in structure.layers if layer.path.endswith("to_q"))
    quantize_structure(network, structure, resolve_recipe(None, layers={query: {"activations": "none"}}))
    layers = quantized_layers(network)
    key, value = (layers[query.replace("to_q", name)] for name in ("to_k", "to_v"))
    assert not layers[query].input_quantizers
    assert len(key.input_quantizers) == len(value.input_quantizers) == 1
    with torch.no_grad():
        network(data.tensors["sample"][:1], data.timesteps[:1])


def test_every_width_from_three_bits_runs_on_an_engine() -> None:
    for name in ("int3", "int4", "int5", "int6", "int8"):
        assert resolve_recipe(weights=name).simulated() == []
        assert FORMATS[name].qmax <= 127
