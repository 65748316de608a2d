"""What the tape plays is what the network computes, for every timestep, whatever else it is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.rounding import SoftRounding
from qdeploy.model.inputs import denoise
from qdeploy.model.schedulers import make_scheduler
from qdeploy.network.current_timestep import attach_current_timestep
from qdeploy.network.roles import Structure, find_structure
from qdeploy.quant.insert import share_current_timestep
from qdeploy.quant.layer import QuantizedLayer, replace_module
from qdeploy.quant.modes import full_precision
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import int4, int8
from tests.helpers import relative
from tests.models import FAMILIES, make

U_NETS = ("unet", "text_unet")


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest) -> tuple[str, nn.Module, dict[str, Tensor], Structure]:
    network, inputs = make(request.param)
    return request.param, network, inputs, find_structure(network, inputs)


def deployed() -> Tensor:
    """Timesteps of common schedules, the ends, and fractional ones."""
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    schedules = []
    for scheduler in (make_scheduler("ddim", DDPMScheduler()), EulerDiscreteScheduler()):
        scheduler.set_timesteps(6)
        schedules.append(torch.as_tensor(scheduler.timesteps).float())
    return torch.cat([*schedules, torch.tensor([0.0, 1.0, 0.5, 999.0])]).unique()


def outputs_of(
    network: nn.Module, paths: tuple[str, ...], inputs: dict[str, Tensor], timestep: Tensor
) -> dict[str, Tensor]:
    """What the layers give while the whole network runs; of repeated calls each, which must agree."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> torch.utils.hooks.RemovableHandle:
        def after(module: nn.Module, args: object, output: Tensor) -> None:
            assert path not in seen or torch.equal(seen[path], output)
            seen[path] = output

        return network.get_submodule(path).register_forward_hook(after)

    handles = [hook(path) for path in paths]
    with torch.no_grad():
        denoise(network, inputs | {"timestep": timestep})
    for handle in handles:
        handle.remove()
    return seen


def other_conditions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value if name == "timestep" else value * -2 + 1 if value.is_floating_point() else value + 2
        for name, value in inputs.items()
    }


# -- P1: bit for bit ---------------------------------------------------------------------------------------


def test_features_are_the_networks_own_bit_for_bit(
    found: tuple[str, nn.Module, dict[str, Tensor], Structure],
) -> None:
    """For every deployed timestep, fractional ones too; and whatever the sample and the conditions are."""
    _, network, inputs, structure = found
    time, timesteps = structure.time, deployed()
    with torch.no_grad():
        features = time(network, timesteps)
    assert tuple(features) == time.features
    for number, timestep in enumerate(timesteps):
        for given in (inputs, other_conditions(inputs)):
            live = outputs_of(network, time.features, given, timestep[None])
            for name, value in live.items():
                assert torch.equal(features[name][number], value[0]), (name, float(timestep))


def test_features_differ_between_timesteps(
    found: tuple[str, nn.Module, dict[str, Tensor], Structure],
) -> None:
    """Else the test above would pass for constants."""
    _, network, _, structure = found
    with torch.no_grad():
        features = structure.time(network, torch.tensor([1.0, 2.0, 500.0]))
    assert features
    assert all(
        not torch.equal(value[i], value[j]) for value in features.values() for i, j in ((0, 1), (1, 2))
    )


def test_all_timesteps_together_are_equal_but_for_the_last_digits(
    found: tuple[str, nn.Module, dict[str, Tensor], Structure],
) -> None:
    _, network, _, structure = found
    timesteps = torch.arange(0, 1000, 7)
    with torch.no_grad():
        one_by_one = structure.time(network, timesteps)
        together = structure.time.together(network, timesteps)
    assert one_by_one.keys() == together.keys()
    for name, value in one_by_one.items():
        assert together[name].shape == value.shape
        assert relative(value, together[name]) < 1e-5


# -- what belongs to it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", U_NETS)
def test_a_u_nets_block_is_the_embedding_and_every_projection_of_it(family: str) -> None:
    structure = find_structure(*make(family))
    projections = {layer.path for layer in structure.layers if layer.path.endswith("time_emb_proj")}
    assert len(projections) == 8
    assert set(structure.time.features) == projections
    assert structure.time.layers[:2] == ("time_embedding.linear_1", "time_embedding.linear_2")
    assert set(structure.time.layers[2:]) == projections
    assert structure.time.features == structure.time.layers[2:]


@pytest.mark.parametrize("family", ["class_unet", "sdxl_unet"])
def test_where_conditions_enter_the_embedding_the_block_ends_before(family: str) -> None:
    """SDXL's text_embeds and time_ids, and class labels: no table of projections could hold them."""
    structure = find_structure(*make(family))
    assert structure.time.layers == ("time_embedding.linear_1", "time_embedding.linear_2")
    assert structure.time.features == ("time_embedding.linear_2",)
    temporal = {layer.path for layer in structure.layers if layer.temporal}
    assert temporal == set(structure.time.layers)


def test_of_a_class_conditional_transformer_only_the_timestep_embedders_belong_to_it() -> None:
    """Every block has its own; the first block's is called again for the last modulation."""
    structure = find_structure(*make("dit"))
    embedders = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in (0, 1)]
    expected = [f"{path}.linear_{number}" for path in embedders for number in (1, 2)]
    assert list(structure.time.layers) == expected  # in order of execution
    assert list(structure.time.features) == expected[1::2]


def test_of_one_embedding_for_all_blocks_both_uses_are_features() -> None:
    """PixArt's blocks read the projection, its last layer the embedding itself."""
    structure = find_structure(*make("pixart"))
    embedder = "adaln_single.emb.timestep_embedder"
    assert structure.time.layers == (f"{embedder}.linear_1", f"{embedder}.linear_2", "adaln_single.linear")
    assert structure.time.features == (f"{embedder}.linear_2", "adaln_single.linear")


class Twice(nn.Module):
    """One layer that is called for t and again for 2 t."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project, self.body = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        h = self.embed(timestep.reshape(-1, 1) / 1000)
        return (self.body(sample + self.project(h)) * self.project(2 * h),)


def test_a_layer_that_gives_two_features_is_not_taken_for_one() -> None:
    """A table has one row for a timestep: the feature is then what both calls read."""
    torch.manual_seed(0)
    structure = find_structure(Twice(), {"sample": torch.randn(1, 4), "timestep": torch.tensor([500])})
    assert structure.time.features == ("embed",)


def test_a_network_without_timesteps_has_no_such_part() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.body(sample),)

    structure = find_structure(Plain(), {"sample": torch.ones(1, 4), "timestep": torch.tensor([5])})
    assert structure.time.layers == structure.time.features == ()
    assert structure.time(Plain(), torch.arange(3)) == {}


# -- through layers that were replaced ---------------------------------------------------------------------


def quantized(network: nn.Module, structure: Structure) -> dict[str, QuantizedLayer]:
    """Put quantized layers in the time part's place; with min-max ranges of weights, float inputs."""
    layers = {}
    for path in structure.time.layers:
        layer = QuantizedLayer(network.get_submodule(path), int4, int8).requires_grad_(False)
        for quantizer, weight in layer.weight_pairs():
            quantizer.set(*minmax_weights(weight, int4))
        for quantizer in layer.activation_quantizers:
            quantizer.set(torch.tensor(0.05), torch.tensor(0))
        replace_module(network, path, layer)
        layers[path] = layer
    share_current_timestep(network)
    return layers


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_the_tape_plays_through_layers_that_took_the_old_ones_place(family: str) -> None:
    network, inputs = make(family)
    structure = find_structure(network, inputs)
    timesteps = torch.tensor([1.0, 40.0, 999.0])
    with torch.no_grad():
        before = structure.time(network, timesteps)
        quantized(network, structure)
        after = structure.time(network, timesteps)
        with full_precision(network):
            switched_off = structure.time(network, timesteps)
    for name in structure.time.features:
        assert torch.equal(before[name], switched_off[name])
        assert not torch.equal(before[name], after[name])
        live = outputs_of(network, (name,), inputs, timesteps[1:2])
        assert torch.equal(after[name][1], live[name][0])


def test_gradients_reach_the_rounding_of_every_layer() -> None:
    network, inputs = make("unet")
    structure = find_structure(network, inputs)
    layers = quantized(network, structure)
    for layer in layers.values():
        for quantizer, weight in layer.weight_pairs():
            quantizer.rounding = SoftRounding(weight, quantizer.scale, quantizer.zero_point, int4)
    features = structure.time.together(network, torch.arange(0, 1000, 100))
    torch.stack([value.square().sum() for value in features.values()]).sum().backward()
    for layer in layers.values():
        gradient = layer.weight_quantizers[0].rounding.v.grad  # type: ignore[union-attr]
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_the_clock_tells_each_timestep_and_nothing_afterwards() -> None:
    network, inputs = make("unet")
    structure = find_structure(network, inputs)
    current, seen = attach_current_timestep(network), []
    path = structure.time.layers[0]
    hook = network.get_submodule(path).register_forward_hook(lambda *_: seen.append(current.now))
    structure.time(network, torch.tensor([3.0, 700.0]))
    hook.remove()
    assert [now.tolist() for now in seen if now is not None] == [[3.0], [700.0]]
    assert current.now is None
