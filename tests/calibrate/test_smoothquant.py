"""SmoothQuant: outliers migrate from activations to weights, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import WeightRanges
from qdeploy.calibrate.methods.smoothquant import (
    ChannelSpreads,
    MigrateOutliers,
    best_alpha,
    migration_factors,
    weight_ranges,
)
from qdeploy.calibrate.rounding_noise import relative_noise
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import FLOOR, relative_factors, smooth
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.quant.state import code_shapes, read_state, write_state
from qdeploy.recipe.formats import Format, int4, int8
from qdeploy.recipe.stages import check_stages
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, calibrating, minmax_layer, relative, tiny_unet

DATA = MemoryRows.noisy()
OPERATORS = {
    "linear": (lambda: nn.Linear(16, 12), (40, 16)),
    "conv": (lambda: nn.Conv2d(16, 12, 3), (8, 16, 6, 6)),
}


def seeded(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer, and its input with outliers planted in two channels."""
    make, shape = OPERATORS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer, x = make().requires_grad_(False), torch.randn(shape)
    x.select(1, 3).mul_(60)
    x.select(1, 11).mul_(25)
    return layer, x


def factors_of(layer: nn.Module, x: Tensor, alpha: float = 0.5) -> Tensor:
    activations = x.abs().movedim(1, 0).flatten(1).amax(1)
    return migration_factors(activations, weight_ranges(QuantizedLayer(layer, None, None)), alpha)


def test_equation_four() -> None:
    activations, weights = torch.tensor([8.0, 2.0, 0.0, 3.0]), torch.tensor([2.0, 0.5, 1.0, 0.0])
    assert migration_factors(activations, weights, 0.5).tolist() == [2, 2, 1, 1]
    assert migration_factors(activations, weights, 1.0).tolist() == [8, 2, 1, 1]
    torch.testing.assert_close(migration_factors(activations, weights, 0.0)[:2], torch.tensor([0.5, 2.0]))


def test_weight_ranges_are_those_of_input_channels() -> None:
    layer = nn.Conv2d(3, 5, 2).requires_grad_(False)
    found = weight_ranges(QuantizedLayer(layer, None, None))
    assert torch.equal(found, layer.weight.abs().amax((0, 2, 3)))


def test_factors_are_ratios_positive_and_bounded() -> None:
    factors = relative_factors(torch.tensor([1e-30, 1.0, 1e30, float("inf"), float("nan")]))
    assert ((factors >= FLOOR) & (factors <= 1 / FLOOR)).all()
    torch.testing.assert_close(relative_factors(torch.full((7,), 0.03)), torch.ones(7))


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("weights", [int8, int4])
def test_planted_outliers_cost_less(kind: str, weights: Format) -> None:
    """P22: the input's range shrinks, and so does the error of weight and activation together."""
    layer, x = seeded(kind)
    expected = layer(x)
    plain = minmax_layer(layer, x, weights, int8)
    smoothed = QuantizedLayer(layer, weights, int8)
    smooth(smoothed, factors_of(layer, x))
    for quantizer, weight in smoothed.weight_pairs():
        quantizer.set(*minmax_weights(weight, weights))
    (part,) = smoothed.input_parts(x)
    smoothed.activation_quantizers[0].set(*to_scale(part.min(), part.max(), int8))
    assert part.abs().max() < x.abs().max()
    if weights is int8:
        assert relative(expected, smoothed(x)) < relative(expected, plain(x))


@pytest.mark.parametrize("kind", OPERATORS)
def test_smoothing_alone_changes_nothing(kind: str) -> None:
    layer, x = seeded(kind)
    smoothed = QuantizedLayer(layer, None, None)
    smooth(smoothed, factors_of(layer, x))
    torch.testing.assert_close(smoothed(x), layer(x), rtol=1e-4, atol=1e-4)
    smoothed.quantized = False
    assert torch.equal(smoothed(x), layer(x))


def spreads_of(x: Tensor) -> ChannelSpreads:
    channels = x.movedim(1, 0).flatten(1)
    return ChannelSpreads(channels.amin(1), channels.amax(1), channels.square().mean(1))


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_estimated_noise_is_what_quantization_makes(kind: str, alpha: float) -> None:
    inner, x = seeded(kind)
    factors = relative_factors(factors_of(inner, x, alpha))
    layer = QuantizedLayer(inner, int8, int8)
    estimate = relative_noise([layer], *vars(spreads_of(x)).values(), factors)
    smooth(layer, factors)
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, int8))
    (part,) = layer.input_parts(x)
    layer.activation_quantizers[0].set(*to_scale(part.min(), part.max(), int8))
    bias = inner.bias.view(-1, *[1] * (x.ndim - 2))  # type: ignore[union-attr, operator]
    error = (layer(x) - inner(x)).square().movedim(1, 0).flatten(1).mean(1)
    signal = (inner(x) - bias).square().movedim(1, 0).flatten(1).mean(1)
    assert estimate == pytest.approx(float((error / signal).sum()), rel=0.4)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("weights", [int8, int4])
def test_the_alpha_that_is_searched_for_has_the_least_noise(kind: str, weights: Format) -> None:
    inner, x = seeded(kind)
    layer, seen = QuantizedLayer(inner, weights, int8), spreads_of(x)
    found = best_alpha([layer], seen, weight_ranges(layer), 6)
    noise = {
        alpha: relative_noise([layer], seen.low, seen.high, seen.square, factors_of(inner, x, alpha))
        for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    }
    assert noise[found] == pytest.approx(min(noise.values()))
    with pytest.raises(UsageError, match="2 alphas or more"):
        MigrateOutliers(search=1)


def session_ranges(session: Session, chosen: dict[str, QuantizedLayer]) -> dict[str, float]:
    """The largest magnitude that each layer's quantizer would see, in full precision."""
    seen: dict[str, float] = {}
    handles = []
    for path, layer in chosen.items():

        def before(module: QuantizedLayer, args: tuple[Tensor], path: str = path) -> None:
            high = max(float(part.abs().max()) for part in module.input_parts(args[0]))
            seen[path] = max(seen.get(path, 0.0), high)

        handles.append(layer.register_forward_pre_hook(before))
    with torch.no_grad(), session.teacher():
        denoise(session.denoiser, session.inputs(session.rows()))
    for handle in handles:
        handle.remove()
    return seen


def test_layers_that_read_one_tensor_share_their_factors(tmp_path: Path) -> None:
    """They share an input quantizer, so one tensor has to come out of all."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        MigrateOutliers().run(session)
        layers = quantized_layers(session.denoiser)
    for path in session.structure.attentions:
        query, key, value = (layers[f"{path}.to_{name}"] for name in "qkv")
        assert query.smoothing is not None
        assert torch.equal(query.smoothing, key.smoothing)  # type: ignore[arg-type]
        assert torch.equal(query.smoothing, value.smoothing)  # type: ignore[arg-type]
        assert query.input_quantizers is value.input_quantizers


@pytest.mark.parametrize("which", ["linear", "all"])
def test_only_the_layers_asked_for_are_smoothed(tmp_path: Path, which: str) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        MigrateOutliers(layers=which).run(session)
        for layer in quantized_layers(session.denoiser).values():
            wanted = which == "all" or isinstance(layer.inner, nn.Linear)
            assert (layer.smoothing is not None) == wanted


def test_the_whole_network_keeps_its_function(tmp_path: Path) -> None:
    inputs = DATA.inputs(range(6))
    with torch.no_grad():
        before = denoise(tiny_unet(), inputs)
        with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
            MigrateOutliers(layers="all").run(session)
            with session.teacher():
                assert torch.equal(denoise(session.denoiser, inputs), before)
            for layer in quantized_layers(session.denoiser).values():
                layer.weight_quantizers, layer.input_quantizers = nn.ModuleList(), nn.ModuleList()
            assert float((denoise(session.denoiser, inputs) - before).abs().max()) < 1e-4


def test_ranges_are_those_of_what_was_smoothed_before(tmp_path: Path) -> None:
    """With alpha 1 every channel of the input reaches the same magnitude, whatever came first."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        layer = quantized_layers(session.denoiser)["mid_block.resnets.0.conv2"]
        smooth(layer, torch.linspace(1, 9, 16))
        MigrateOutliers(alpha=1.0, layers="all").run(session)
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad(), session.teacher():
            denoise(session.denoiser, session.inputs(session.rows()))
        handle.remove()
        highs = layer.input_parts(seen[0])[0].abs().amax((0, 2, 3))
        torch.testing.assert_close(highs, highs.mean().expand_as(highs))


def test_the_ranges_come_from_full_precision_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        layers = quantized_layers(session.denoiser)
        before = session_ranges(session, layers)
        MigrateOutliers(alpha=1.0).run(session)
        assert all(layer.quantized and not layer._forward_pre_hooks for layer in layers.values())
        after = session_ranges(session, layers)
    for path, layer in layers.items():
        if layer.smoothing is None:
            assert after[path] == pytest.approx(before[path])


def test_factors_survive_an_interruption(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        MigrateOutliers().run(session)
        state = read_state(session.denoiser)
    with calibrating(tiny_unet(), DATA, tmp_path / "other") as session:
        write_state(session.denoiser, state, code_shapes(session.denoiser))
        again = read_state(session.denoiser)
    assert any(name.endswith(".smoothing") for name in state)
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize(("option", "value"), [("alpha", -0.1), ("alpha", 1.5), ("layers", "some")])
def test_impossible_options_are_refused(tmp_path: Path, option: str, value: object) -> None:
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "out") as session,
        pytest.raises(UsageError, match="migrate"),
    ):
        MigrateOutliers(**{option: value}).run(session)  # type: ignore[arg-type]


def test_scales_come_after_smoothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="list it before"):
        check_stages([("weight-ranges", {}), ("migrate-outliers", {})])
    with calibrating(tiny_unet(), DATA, tmp_path / "out") as session:
        MigrateOutliers(layers="all").run(session)
        WeightRanges().run(session)
        for layer in quantized_layers(session.denoiser).values():
            for quantizer, weight in layer.weight_pairs():
                assert torch.allclose(quantizer.scale * 127, weight.abs().flatten(1).amax(1), rtol=0.01)
