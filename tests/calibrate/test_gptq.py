"""GPTQ on layers and networks: moments of what a layer reads, codes that beat nearest, resumable, deterministic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods import gptq
from qdeploy.calibrate.methods.gptq import GPTQ, round_layer
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges, round_to_nearest
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.calibrate.second_moments import Moments, columns_of, read_vectors
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.recipe.formats import Format, int4, int4b64, uint4
from qdeploy.recipe.stages import check_stages
from qdeploy.system.errors import UsageError
from tests.helpers import MemoryRows, Stopped, calibrating, minmax_layer, relative, same_state, tiny_unet

DATA = MemoryRows.noisy()
EVERYTHING = 10**9


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return make().requires_grad_(False)


def smooth_images(channels: int, seed: int = 0) -> Tensor:
    """Neighbouring pixels and channels are alike, and their mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(6, channels, 3, 3, generator=generator)
    mixed = torch.einsum("bchw,cd->bdhw", coarse, torch.randn(channels, channels, generator=generator))
    return nn.functional.interpolate(mixed, size=9, mode="bilinear") + 0.5


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False),
    "dilated": lambda: nn.Conv2d(8, 12, (3, 2), padding=(2, 1), dilation=2),
    "in groups": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same"),
    "circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "of one pixel": lambda: nn.Conv2d(8, 12, 1),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_the_vectors_are_what_a_convolution_multiplies_its_weight_with(make: Any) -> None:
    inner = seeded(make)
    x = smooth_images(8)
    layer = QuantizedLayer(inner, int4, None)
    vectors = read_vectors(layer, x, EVERYTHING, torch.Generator())
    groups, columns = columns_of(layer)
    assert vectors.shape[0] == groups
    assert vectors.shape[2] == columns
    weight = inner.weight.view(groups, -1, columns)
    product = torch.einsum("gnk,gok->ngo", vectors, weight).flatten(1)
    if inner.bias is not None:
        product = product + inner.bias
    expected = inner(x).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(product, expected, atol=1e-4)


def test_fewer_vectors_are_drawn_from_all_of_them() -> None:
    layer = QuantizedLayer(seeded(lambda: nn.Conv2d(8, 12, 3, padding=1)), int4, None)
    every = read_vectors(layer, smooth_images(8), EVERYTHING, torch.Generator())[0]
    some = read_vectors(layer, smooth_images(8), 50, torch.Generator().manual_seed(1))[0]
    assert some.shape == (50, 72)
    assert all((every == vector).all(1).any() for vector in some)
    assert len(some.unique(dim=0)) == 50


def moments_of(layer: QuantizedLayer, *inputs: Tensor) -> Moments:
    moments = Moments(layer)
    for x in inputs:
        moments.add(read_vectors(layer, x, EVERYTHING, torch.Generator()))
    return moments


def test_moments_do_not_depend_on_batches() -> None:
    layer = QuantizedLayer(seeded(lambda: nn.Conv2d(8, 12, 3, padding=1)), int4, None)
    x = smooth_images(8)
    whole, parts = moments_of(layer, x), moments_of(layer, x[:1], x[1:])
    assert torch.allclose(whole.hessian(True), parts.hessian(True), rtol=1e-4, atol=1e-4)
    vectors = read_vectors(layer, x, EVERYTHING, torch.Generator())[0]
    assert torch.allclose(whole.hessian(True)[0], vectors.T.cov(correction=0), rtol=1e-3, atol=1e-3)
    assert torch.allclose(whole.hessian(False)[0], vectors.T @ vectors / len(vectors), rtol=1e-4, atol=1e-4)


def linear() -> nn.Module:
    return nn.Linear(64, 24)


LAYERS: dict[str, tuple[Any, Format, tuple[int, ...]]] = {
    **{name: (make, int4, ()) for name, make in CONVOLUTIONS.items()},
    "split": (lambda: nn.Conv2d(8, 12, 3, padding=1), uint4, (3, 5)),
    "linear": (linear, uint4, ()),
    "blocks": (linear, int4b64, ()),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_layer_is_closer_to_itself_than_rounded_to_nearest(name: str, bias: bool) -> None:
    make, number_format, split = LAYERS[name]
    inner = seeded(make)
    x = smooth_images(8)
    if isinstance(inner, nn.Linear):
        x = x.flatten(2)[..., :64].transpose(1, 2)[..., None].expand(-1, -1, -1, 8).flatten(2)
        x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    nearest, layer = (minmax_layer(inner, x, number_format, None, split) for _ in range(2))
    round_to_nearest(nearest)
    gain = round_layer(layer, moments_of(layer, x), GPTQ(bias=bias))
    exact = inner(x)
    reached = relative(exact, layer(x)) / relative(exact, nearest(x))
    assert reached**2 == pytest.approx(gain, rel=1e-2)
    assert reached < (1.0 if name in {"depthwise", "of one pixel"} else 0.9)
    assert (layer.tuned_bias is not None) == (bias and inner.bias is not None)
    codes = [quantizer.codes for quantizer in layer.weight_quantizers]
    assert [c.shape[1] for c in codes] == list(split or [inner.weight.shape[1]])  # type: ignore[union-attr, operator]


def rounded(output: Path, data: Any = DATA, **options: Any) -> Any:
    with calibrating(tiny_unet(), data, output, weights="int4", method="gptq", seed=3) as session:
        WeightRanges("lp").run(session)
        GPTQ(**options).run(session)
    return session


def test_layers_of_a_network_see_inputs_from_layers_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = gptq.read_vectors
    done: list[int] = []

    def spy(layer: QuantizedLayer, *args: Any) -> Tensor:
        layers = list(quantized_layers(session.denoiser).values())
        decided = [each for each in layers if all(q.codes is not None for q in each.weight_quantizers)]
        done.append(len(decided))
        assert layer not in decided
        assert not any(q.enabled for each in layers for q in each.activation_quantizers)
        return stock(layer, *args)

    monkeypatch.setattr(gptq, "read_vectors", spy)
    with calibrating(tiny_unet(), DATA, tmp_path / "out", weights="int4", activations="int8") as session:
        WeightRanges("lp").run(session)
        GPTQ().run(session)
        for layer in quantized_layers(session.denoiser).values():
            assert all(quantizer.codes is not None for quantizer in layer.weight_quantizers)
    assert done == sorted(done)
    assert len(set(done)) > len(session.units)  # layer by layer, not unit by unit


def prediction_error(session: Any, data: MemoryRows) -> float:
    inputs = data.inputs(range(len(data)))
    with torch.no_grad(), session.weights_only():
        found = session.denoiser(**inputs).sample
        with session.teacher():
            return relative(session.denoiser(**inputs).sample, found)


def test_the_prediction_on_unseen_rows_is_closer_than_rounded_to_nearest(tmp_path: Path) -> None:
    unseen = MemoryRows.noisy(images=8)
    unseen.tensors["sample"] = unseen.tensors["sample"].flip(-1)
    with calibrating(tiny_unet(), DATA, tmp_path / "nearest", weights="int4") as session:
        WeightRanges("lp").run(session)
        nearest = prediction_error(session, unseen)
    assert prediction_error(rounded(tmp_path / "gptq"), unseen) < 0.8 * nearest


def test_a_stopped_run_continues_where_it_was_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rounded(tmp_path / "whole")
    stock, calls = gptq.round_layer, 0

    def stopping(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stopped
        return stock(*args)

    monkeypatch.setattr(gptq, "round_layer", stopping)
    with pytest.raises(Stopped):
        rounded(tmp_path / "out")
    again = rounded(tmp_path / "out")
    layers = len(quantized_layers(again.denoiser))
    assert layers < calls < 2 * layers  # what was done was not done again
    assert same_state(again, whole)


def test_what_is_decided_already_stays(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out", weights="int4") as session:
        WeightRanges("lp").run(session)
        first = next(iter(quantized_layers(session.denoiser).values()))
        round_to_nearest(first)
        before = first.weight_quantizers[0].codes.clone()  # type: ignore[union-attr, operator]
        GPTQ().run(session)
        assert torch.equal(first.weight_quantizers[0].codes, before)  # type: ignore[arg-type]


def test_the_method_runs_whole_and_its_biases_are_kept(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "out", weights="int4", method="gptq") as session:
        session.recipe = replace(session.recipe, stages=(WeightRanges(), GPTQ(bias=True), ActivationRanges()))
        run_stages(session)
        assert any(layer.tuned_bias is not None for layer in quantized_layers(session.denoiser).values())


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 2.0}, {"samples": 0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"damping|samples"):
        GPTQ(**options)


def test_ranges_come_first() -> None:
    with pytest.raises(UsageError, match="needs weight scales"):
        check_stages(["gptq"])


@pytest.mark.parametrize("name", ["plain", "in groups", "split", "linear"])
def test_inputs_that_are_off_are_made_up_for(name: str) -> None:
    """What the layer reads has lost a tenth, and 0.2: a weight that knows comes closer to what it should compute."""
    make, number_format, split = LAYERS[name]
    inner = seeded(make)
    wanted = smooth_images(8)
    wanted = wanted.flatten(2)[..., :64].transpose(1, 2) if isinstance(inner, nn.Linear) else wanted
    if isinstance(inner, nn.Linear):
        wanted = wanted.repeat(1, 1, 8)
    x = 0.9 * wanted - 0.2
    errors = []
    for compared in (False, True):
        layer = minmax_layer(inner, x, number_format, None, split)
        moments = Moments(layer, compared)
        read = [read_vectors(layer, each, EVERYTHING, torch.Generator()) for each in (x, wanted)]
        moments.add(read[0], read[1] if compared else None)
        round_layer(layer, moments, GPTQ(bias=True, full_inputs=compared))
        errors.append(relative(inner(wanted), layer(x)))
    assert errors[1] < 0.7 * errors[0]
