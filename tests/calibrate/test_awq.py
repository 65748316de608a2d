"""AWQ: salient channels are found and kept precise, and the unquantized network stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods import awq
from qdeploy.calibrate.methods.minmax import WeightRanges
from qdeploy.calibrate.smoothing import smooth, smoothing_groups
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.ranges import minmax_weights
from qdeploy.recipe.formats import Format, int4, int4b64
from qdeploy.recipe.stages import check_stages
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, calibrating, dit_rows, relative
from tests.models import tiny_dit

SALIENT = [3, 40, 77, 101]


def planted(loud: float) -> tuple[nn.Linear, Tensor]:
    """A layer and [256, 128] inputs of which four channels are so many times as loud as the others."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer, x = nn.Linear(128, 64).requires_grad_(False), torch.randn(256, 128)
    x[:, SALIENT] *= loud
    return layer, x


def error(layer: QuantizedLayer, x: Tensor, number_format: Format) -> float:
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, number_format))
    return relative(layer(x), layer.inner(x))


@pytest.mark.parametrize("number_format", [int4, int4b64], ids=lambda f: f.name)
def test_salient_channels_cost_less_than_by_rounding_to_nearest(number_format: Format) -> None:
    inner, x = planted(30)
    nearest = error(QuantizedLayer(inner, number_format, None), x, number_format)
    layer = QuantizedLayer(inner, number_format, None)
    alpha, factors = awq.best_factors([layer], x, 20, "minmax")
    smooth(layer, factors)
    assert error(layer, x, number_format) < 0.8 * nearest
    assert 0 < alpha < 1
    others = [channel for channel in range(128) if channel not in SALIENT]
    assert factors[SALIENT].min() > factors[others].max()


def test_the_best_alpha_of_the_grid_is_taken() -> None:
    """By hand: of all alphas of the grid, none has a smaller error of the output."""
    inner, x = planted(10)
    found, _ = awq.best_factors([QuantizedLayer(inner, int4b64, None)], x, 5, "minmax")
    errors = {}
    for alpha in (0.0, 0.2, 0.4, 0.6, 0.8):
        layer = QuantizedLayer(inner, int4b64, None)
        smooth(layer, x.abs().mean(0).pow(alpha))
        errors[alpha] = error(layer, x, int4b64)
    assert found == min(errors, key=lambda alpha: errors[alpha])


def test_silent_channels_keep_their_scale() -> None:
    inner, x = planted(10)
    x[:, 0] = 0
    _, factors = awq.best_factors([QuantizedLayer(inner, int4b64, None)], x, 20, "minmax")
    assert factors[0] == 1
    assert torch.isfinite(factors).all()


def test_every_group_of_a_network_gets_closer_and_nothing_changes_unquantized(tmp_path: Path) -> None:
    data = dit_rows(MemoryRows.noisy())
    inputs = {name: tensor[::5] for name, tensor in data.tensors.items()}
    recipe = {"weights": "int4b64", "activations": "none", "target": "tensorrt"}
    with torch.no_grad():
        reference = denoise(tiny_dit(), inputs)
    errors: dict[str, list[float]] = {"nearest": [], "awq": []}
    for name, found in errors.items():
        network = tiny_dit()
        with calibrating(network, data, tmp_path / name, **recipe) as session, torch.no_grad():
            if name == "awq":
                awq.ScaleSalient(grid=5).run(session)
            WeightRanges(finder="minmax").run(session)
            with session.teacher():
                assert torch.equal(denoise(network, inputs), reference)
            groups = smoothing_groups(session, linear=True)
            for group, x in zip(groups, awq.recorded_inputs(session, groups), strict=True):
                found.append(sum(float((layer(x) - layer.inner(x)).square().sum()) for layer in group))
    pairs = list(zip(errors["awq"], errors["nearest"], strict=True))
    assert all(ours <= nearest * (1 + 1e-5) for ours, nearest in pairs)  # alpha = 0 is among the trials
    assert sum(errors["awq"]) < sum(errors["nearest"])
    layers = quantized_layers(network)
    shared = [layers[f"transformer_blocks.0.attn1.to_{part}"].smoothing for part in "qkv"]
    assert all(torch.equal(one, shared[0]) for one in shared)  # type: ignore[arg-type]


def test_inputs_are_recorded_in_the_memory_there_is(tmp_path: Path) -> None:
    """With room for one group at a time the network runs once for each, and finds the same."""
    states = []
    for memory in (2**30, 1):
        network = tiny_dit()
        recipe = {"weights": "int4b64", "activations": "none", "target": "tensorrt"}
        place = tmp_path / str(memory)
        with calibrating(
            network, dit_rows(MemoryRows.noisy()), place, max_memory=memory, **recipe
        ) as session:
            awq.ScaleSalient(grid=4).run(session)
        states.append({path: layer.smoothing for path, layer in quantized_layers(network).items()})
    assert all(torch.equal(states[0][path], smoothing) for path, smoothing in states[1].items())  # type: ignore[arg-type]


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="list it before"):
        check_stages([("weight-ranges", {}), ("scale-salient", {})])
    with (
        calibrating(tiny_dit(), dit_rows(MemoryRows.noisy()), tmp_path / "x") as session,
        pytest.raises(UsageError, match="grid"),
    ):
        awq.ScaleSalient(grid=0).run(session)
