"""DGQ: groups that isolate outliers, and rewrites that are exact.

Traps are those of the released code; each test fails when its trap is put back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    InputSpreads,
    cluster,
    extremes,
    input_spreads,
    relative_spans,
)
from qdeploy.calibrate.input_groups import reference_dimension, set_group_scales
from qdeploy.calibrate.methods import dgq, dgq_attention, dgq_tokens, minmax
from qdeploy.calibrate.rounding_noise import rounding_noise
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.export.graph import constant
from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import CurrentTimestep, midpoints
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.quant.modes import full_precision
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.patches import PIXELS, ROWS
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.state import read_state
from qdeploy.recipe import effort as efforts
from qdeploy.recipe.formats import Format, int4, int8, uint8
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import check_stages
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import PROBE
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.machine import int8_sums_saturate
from tests.helpers import TINY, MemoryRows, calibrating, relative, tiny_unet

DATA = MemoryRows.noisy()
WIDTH = 12


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def spread_input(rows: int = 64, channels: int = WIDTH) -> Tensor:
    """Channels whose ranges differ by a factor of a hundred, some of them lopsided."""
    factors = torch.logspace(-1, 1, channels)
    return (torch.randn(rows, channels, generator=seeded()) + torch.linspace(-1, 2, channels)) * factors


def labels_of(x: Tensor, groups: int) -> Tensor:
    return cluster(x.amin(0), x.amax(0), groups, seeded())


def grouped(x: Tensor, labels: Tensor, number_format: Format) -> Tensor:
    """The definition: each group has the scale that covers it, and zero."""
    result = torch.empty_like(x)
    for group in labels.unique():
        part = x[:, labels == group]
        scale, zero = to_scale(part.min(), part.max(), number_format)
        result[:, labels == group] = fake_quantize(part, scale, zero, number_format.qmin, number_format.qmax)
    return result


# -- groups ------------------------------------------------------------------------------------------------


def test_one_group_is_min_max_per_tensor_and_c_groups_are_channels_of_their_own() -> None:
    """P15."""
    x = spread_input()
    assert torch.equal(labels_of(x, 1), torch.zeros(WIDTH, dtype=torch.int64))
    assert len(labels_of(x, WIDTH).unique()) == WIDTH
    scale, zero = to_scale(x.min(), x.max(), int8)
    assert torch.equal(grouped(x, labels_of(x, 1), int8), fake_quantize(x, scale, zero, -128, 127))


@pytest.mark.parametrize("number_format", [int8, uint8], ids=lambda f: f.name)
def test_more_groups_mean_less_error(number_format: Format) -> None:
    """P15."""
    x = spread_input()
    errors = [
        float((x - grouped(x, labels_of(x, groups), number_format)).square().mean())
        for groups in (1, 2, 4, 8, WIDTH)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_an_outlier_channel_is_alone_in_its_group() -> None:
    """P16."""
    x = torch.randn(64, 16, generator=seeded())
    x[:, 5] *= 50
    labels = labels_of(x, 2)
    assert labels[5] == 1
    assert int(labels.sum()) == 1


@pytest.mark.parametrize("groups", [2, 3, 8])
def test_no_group_is_empty(groups: int) -> None:
    """DGQ-4: where fewer ranges differ than there are groups, the code gives some the range [0, 1]."""
    low, high = -torch.tensor([1.0, 1, 1, 5, 5, 1]), torch.tensor([1.0, 1, 1, 5, 5, 1])
    labels = cluster(low, high, groups, seeded())
    assert labels.tolist() == [0, 0, 0, 1, 1, 0]
    many = torch.rand(200, generator=seeded()).pow(8)
    found = cluster(-many, many, groups, seeded())
    assert (torch.bincount(found, minlength=groups) > 0).all()


def test_groups_depend_on_the_seed_alone() -> None:
    x = spread_input()
    before = labels_of(x, 4)
    torch.manual_seed(5)
    assert torch.equal(labels_of(x, 4), before)


@pytest.mark.parametrize("number_format", [int8, uint8], ids=lambda f: f.name)
def test_zero_is_a_code_although_a_group_never_saw_it(number_format: Format) -> None:
    """DGQ-3: a group's range may exclude zero; its zero point then is no code, and padding is not exact."""
    low, high = torch.tensor([5.0, 5.5, -9.0, 1.0]), torch.tensor([6.0, 6.5, -8.0, 2.0])
    labels = torch.tensor([0, 0, 1, 2])
    shares = relative_spans(low, high, labels, number_format.symmetric)
    scale, zero = to_scale(low.min(), high.max(), number_format)
    assert number_format.qmin <= int(zero) <= number_format.qmax
    for value in (low, high):
        codes = value / (scale * shares) + zero
        assert ((codes > number_format.qmin - 0.6) & (codes < number_format.qmax + 0.6)).all()
    at_zero = fake_quantize(
        torch.zeros(4), scale * shares, zero.expand(4), number_format.qmin, number_format.qmax
    )
    assert torch.equal(at_zero, torch.zeros(4))


def test_a_dead_channel_keeps_a_factor_of_use() -> None:
    low, high = torch.zeros(3), torch.tensor([0.0, 1.0, 50.0])
    shares = relative_spans(low, high, torch.arange(3), True)
    assert ((shares > 0) & (shares <= 1)).all()
    assert torch.equal(relative_spans(low, low, torch.arange(3), True), torch.ones(3))


# -- dimensions --------------------------------------------------------------------------------------------


def dimension(inner: nn.Module, x: Tensor) -> str | None:
    seen = InputSpreads(inner, torch.tensor([3.0]))
    seen.observe(x, torch.tensor([3.0]))
    return reference_dimension(seen.tensors())


def test_planted_outliers_decide_the_dimension() -> None:
    """P16."""
    x = torch.randn(8, 10, 16, generator=seeded())
    channel, token = x.clone(), x.clone()
    channel[..., 3] *= 50
    token[:, 4] *= 50
    assert dimension(nn.Linear(16, 4), channel) == CHANNELS
    assert dimension(nn.Linear(16, 4), token) == TOKENS
    image = torch.randn(8, 16, 6, 6, generator=seeded())
    pixel, row = image.clone(), image.clone()
    pixel[:, :, 2, 3] *= 50
    row[:, 7] *= 50
    assert dimension(nn.Conv2d(16, 4, 1), pixel) == PIXELS
    assert dimension(nn.Conv2d(16, 4, 3, padding=1), row) == ROWS


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1, "dilation": 2}]
)
def test_rows_and_pixels_are_those_of_im2col(options: dict[str, int]) -> None:
    inner, x = nn.Conv2d(4, 2, 3, **options), torch.randn(3, 4, 9, 8, generator=seeded())
    columns = nn.functional.unfold(x, 3, **options)
    found = extremes(inner, x)
    assert torch.equal(found[PIXELS][0], columns.amin(1))
    assert torch.equal(found[PIXELS][1], columns.amax(1))
    for mine, theirs in zip(found[ROWS], (columns.amin(2), columns.amax(2)), strict=True):
        assert torch.equal(mine.sort(1).values, theirs.sort(1).values)


def test_inputs_of_two_axes_are_seen_in_every_row() -> None:
    """DGQ-9: the code leaves them with the first batch's range, and never groups them."""
    seen = InputSpreads(nn.Linear(4, 2), torch.tensor([1.0, 2.0]))
    x = torch.randn(6, 4, generator=seeded())
    for half, t in ((x[:3], 1.0), (x[3:], 2.0)):
        seen.observe(half, torch.tensor([t]))
    found = seen.tensors()
    assert torch.equal(found[f"{CHANNELS}.low"], x.amin(0))
    assert torch.equal(found[f"{CHANNELS}.high"], x.amax(0))


def test_a_number_of_tokens_that_changes_is_no_dimension() -> None:
    seen = InputSpreads(nn.Linear(4, 2), torch.tensor([1.0]))
    for tokens in (5, 6):
        seen.observe(torch.randn(2, tokens, 4, generator=seeded()), torch.tensor([1.0]))
    assert f"{TOKENS}.low" not in seen.tensors()
    assert reference_dimension(seen.tensors()) is None


# -- the rewrites ------------------------------------------------------------------------------------------


@pytest.fixture(params=["linear", "conv"])
def inner(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    wide = WIDTH
    layer = nn.Linear(wide, 7) if request.param == "linear" else nn.Conv2d(wide, 7, 3, padding=1)
    return layer.requires_grad_(False)


def shaped(x: Tensor, inner: nn.Module) -> Tensor:
    """[64, C] as tokens or as an image, the channels where the layer reads them."""
    if isinstance(inner, nn.Linear):
        return x.view(4, 16, -1)
    return x.view(4, 4, 4, -1).permute(0, 3, 1, 2)


def calibrated(layer: QuantizedLayer, x: Tensor) -> QuantizedLayer:
    for quantizer, part in zip(layer.activation_quantizers, layer.input_parts(x), strict=True):
        quantizer.set(*to_scale(part.min(), part.max(), quantizer.format))
    return layer


@pytest.mark.parametrize("form", ["fold", "split"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_rewrite_is_grouped_quantization_with_the_float_weight(
    inner: nn.Module, form: str, groups: int
) -> None:
    """P17."""
    x = spread_input()
    labels = labels_of(x, groups)
    spans = relative_spans(x.amin(0), x.amax(0), labels, True)
    layer = QuantizedLayer(inner, None, int8)
    plan = dgq.GroupPlan(labels, spans / spans.min(), 1.0)
    (dgq._fold if form == "fold" else dgq._split)([layer], plan)
    calibrated(layer, shaped(x, inner))
    assert len(layer.activation_quantizers) == (groups if form == "split" else 1)
    expected = inner(shaped(grouped(x, labels, int8), inner))
    assert relative(expected, layer(shaped(x, inner))) < 1e-5


@pytest.mark.parametrize("form", ["fold", "split"])
def test_the_order_of_channels_means_nothing(inner: nn.Module, form: str) -> None:
    """P17."""
    x, mixed = spread_input(), torch.randperm(WIDTH, generator=seeded())
    other = type(inner)(*((WIDTH, 7) if isinstance(inner, nn.Linear) else (WIDTH, 7, 3)))
    if isinstance(other, nn.Conv2d):
        other.padding, other._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]
    other.load_state_dict({"weight": inner.weight[:, mixed], "bias": inner.bias})  # type: ignore[index]
    outputs = []
    for module, seen in ((inner, x), (other.requires_grad_(False), x[:, mixed])):
        labels = labels_of(seen, 3)
        spans = relative_spans(seen.amin(0), seen.amax(0), labels, True)
        layer = QuantizedLayer(module, None, int8)
        (dgq._fold if form == "fold" else dgq._split)(
            [layer], dgq.GroupPlan(labels, spans / spans.min(), 1.0)
        )
        outputs.append(calibrated(layer, shaped(seen, inner))(shaped(seen, inner)))
    assert relative(*outputs) < 1e-5


def test_parts_that_are_cut_anew_ask_the_same_clock() -> None:
    layer = QuantizedLayer(nn.Linear(4, 2), int8, int8)
    current = layer.activation_quantizers[0].current_timestep = CurrentTimestep()
    layer.cut((1, 3), torch.tensor([2, 0, 1, 3]))
    assert all(quantizer.current_timestep is current for quantizer in layer.activation_quantizers)


def test_estimated_noise_tells_what_folding_does_to_narrow_weights() -> None:
    """Section 3.1 of the analysis: folding helps eight bits, and spoils four where one channel stands out."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    x[:, 9] *= 50
    low, high, square = x.amin(0), x.amax(0), x.square().mean(0)
    labels = cluster(low, high, 2, seeded())
    spans = relative_spans(low, high, labels, True)
    for weights, form, better in ((int8, "fold", True), (int4, "fold", False), (int4, "split", True)):
        module = QuantizedLayer(nn.Linear(64, 32).requires_grad_(False), weights, int8)
        after = rounding_noise(
            [module], low, high, square, spans / spans.min(), labels if form == "split" else None
        )
        before = rounding_noise([module], low, high, square, torch.ones(64), None)
        measured = []
        for plan in (None, dgq.GroupPlan(labels, spans / spans.min(), 1.0)):
            layer = QuantizedLayer(module.inner, weights, int8)
            if plan:
                (dgq._fold if form == "fold" else dgq._split)([layer], plan)
            for quantizer, weight in layer.weight_pairs():
                quantizer.set(*minmax.WEIGHT_FINDERS["minmax"](weight, weights))
            exact = module.inner(x)
            measured.append(float((calibrated(layer, x)(x) - exact).square().mean()))
        assert (after < before) == better == (measured[1] < measured[0])
        assert after / before == pytest.approx(measured[1] / measured[0], rel=0.4)


# -- in a network ------------------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_factors_and_quantizers(tmp_path: Path) -> None:
    for form in ("fold", "split"):
        with calibrating(tiny_unet(), DATA, tmp_path / form, method="dgq") as session:
            dgq.GroupChannels(groups=2, form=form, check=False).run(session)
            layers = quantized_layers(session.denoiser)
            for path in session.structure.attentions:
                query, key, value = (layers[f"{path}.to_{name}"] for name in "qkv")
                assert query.input_quantizers is key.input_quantizers is value.input_quantizers
                for name in ("smoothing", "order"):
                    found = [getattr(layer, name) for layer in (query, key, value)]
                    assert (found[0] is None) == (name == ("order" if form == "fold" else "smoothing"))
                    assert found[0] is None or all(torch.equal(found[0], other) for other in found)
            shortcuts = [layers[layer.path] for layer in session.layers if layer.split]
            assert shortcuts
            assert all(layer.smoothing is None and layer.order is None for layer in shortcuts)
            counts = session.report["groups"]
            assert counts["left"]["quantizes the halves of a concatenation"] == len(shortcuts)
            assert counts["grouped"] == len(session.layers) - sum(counts["left"].values())


@pytest.mark.parametrize("mode", ["teacher", "weights_only"])
def test_ranges_are_those_of_float_activations(tmp_path: Path, mode: str) -> None:
    """DGQ-8: the code records them behind layers whose own scales are still a first guess."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="dgq") as session:
        layers = {layer.path: quantized_layers(session.denoiser)[layer.path] for layer in session.layers}
        fine = input_spreads(session, layers, getattr(session, mode), "")
        for layer in layers.values():
            for quantizer in layer.activation_quantizers:
                quantizer.set(torch.tensor(50.0), torch.tensor(0))
        crude = input_spreads(session, layers, getattr(session, mode), "")
    assert all(torch.equal(fine[name], crude[name]) for name in fine)
    assert f"{session.layers[0].path}:{CHANNELS}.low" in fine


def test_one_group_changes_nothing(tmp_path: Path) -> None:
    """DGQ-11: one group is per-tensor quantization, and says so."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="dgq") as session:
        before = read_state(session.denoiser)
        dgq.GroupChannels(groups=1).run(session)
        assert read_state(session.denoiser).keys() == before.keys()
        assert session.report["groups"]["grouped"] == 0
        assert session.report["groups"]["left"]["one group"] > 0


class Stopped(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("form", ["fold", "split"])
def test_a_stopped_run_continues_with_the_same_groups(tmp_path: Path, form: str, monkeypatch: Any) -> None:
    stages = (
        ("group-channels", {"form": form, "check": False}),
        ("weight-ranges", {}),
        ("activation-ranges", {}),
        ("group-tokens", {"groups": 2}),
    )
    recipe: dict[str, Any] = {"method": "dgq", "stages": stages, "timestep_groups": 2}

    def run(output: Path) -> dict[str, Tensor]:
        with calibrating(tiny_unet(), DATA, output, **recipe) as session:
            run_stages(session)
            return read_state(session.denoiser)

    expected = run(tmp_path / "whole")

    def stop(*args: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(minmax, "summarize", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    found = run(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(name.endswith(".edges") for name in found)


def test_groups_of_timesteps_scale_all_groups_of_channels(tmp_path: Path) -> None:
    """DGQ-4: dimension, groups and ratios stay; one factor varies with the timestep, by its value."""
    with calibrating(tiny_unet(), DATA, tmp_path / "out", method="dgq", timestep_groups=2) as session:
        dgq.GroupChannels(form="split", check=False).run(session)
        minmax.WeightRanges().run(session)
        minmax.ActivationRanges().run(session)
        cut = [layer for layer in quantized_layers(session.denoiser).values() if layer.order is not None]
        assert cut
        assert all(len(q.scale) == 2 and q.banked for layer in cut for q in layer.activation_quantizers)
        with torch.no_grad():
            quantized = denoise(session.denoiser, DATA.inputs(range(8)))
            with full_precision(session.denoiser):
                reference = denoise(session.denoiser, DATA.inputs(range(8)))
    assert relative(reference, quantized) < 0.1


def test_every_timestep_of_plms_finds_the_scale_that_it_was_calibrated_with() -> None:
    """P20, DGQ-1 and DGQ-2: counting calls, one is off behind the timestep that PLMS asks for twice."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(25)
    called = scheduler.timesteps.float()
    assert len(called) == 26
    distinct = called.unique()
    current = CurrentTimestep()
    with current.at(called):
        assert torch.equal(distinct[current.index(midpoints(distinct))], called)


# -- tokens ------------------------------------------------------------------------------------------------


def token_layer(number_format: Format, groups: int) -> tuple[QuantizedLayer, Tensor, Tensor]:
    x = torch.randn(3, 6, 4, generator=seeded())
    x[:, 2] *= 40
    layer = QuantizedLayer(nn.Linear(4, 5).requires_grad_(False), None, number_format)
    calibrated(layer, x)
    found = {f"{TOKENS}.low": x.amin((0, 2)), f"{TOKENS}.high": x.amax((0, 2))}
    labels = cluster(*found.values(), groups, seeded())
    set_group_scales(layer.activation_quantizers[0], found, TOKENS, labels, -2)
    return layer, x, labels


def test_scales_of_tokens_are_multiplied_back_behind_the_sum() -> None:
    """P17, section 3.1: a scale of a token stands outside of the sum."""
    layer, x, labels = token_layer(int8, 2)
    assert labels.tolist() == [0, 0, 1, 0, 0, 0]
    expected = layer.inner(
        grouped(x.transpose(1, 2).reshape(-1, 6), labels, int8).view(3, 4, 6).transpose(1, 2)
    )
    assert relative(expected, layer(x)) < 1e-5


def test_another_number_of_tokens_is_refused() -> None:
    layer, x, _ = token_layer(int8, 2)
    with pytest.raises(InvalidInputError, match="6 tokens, not 5"):
        layer(x[:, :5])


def test_a_zero_point_that_moves_with_the_token_is_no_engines() -> None:
    layer, _, _ = token_layer(uint8, 2)
    with pytest.raises(CapabilityError, match="zero point that moves"):
        layer.activation_quantizers[0].freeze()


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "positive number, not 0"),
        ({"groups": -2}, "positive number, not -2"),
        ({"groups": True}, "whole number, not True"),
        ({"groups": 2.5}, "whole number, not 2.5"),
        ({"groups": 9}, r"9 groups are more than the 8 input channels of down_blocks"),
        ({"form": "magic"}, "auto, fold, split"),
    ],
    ids=str,
)
def test_groups_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "out", method="dgq") as session,
        pytest.raises(UsageError, match=message),
    ):
        dgq.GroupChannels(**options).run(session)


def test_stages_without_anything_to_work_on_are_refused(tmp_path: Path) -> None:
    with calibrating(tiny_unet(), DATA, tmp_path / "float", method="minmax", activations="none") as session:
        for stage in (dgq.GroupChannels, dgq_tokens.GroupTokens, dgq_attention.LogAttention):
            with pytest.raises(UsageError, match="activations are 'none'"):
                stage().run(session)
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "plain") as session,
        pytest.raises(UsageError, match="dgq-paper"),
    ):
        dgq_attention.LogAttention().run(session)
    unsigned = {"activations": "uint8", "target": "openvino"}
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "unsigned", **unsigned) as session,
        pytest.raises(UsageError, match="symmetric"),
    ):
        dgq_tokens.GroupTokens().run(session)


def test_stages_in_an_impossible_order_are_refused() -> None:
    ranges = ("weight-ranges", {})
    with pytest.raises(UsageError, match="weight scales"):
        check_stages([ranges, ("group-channels", {})])
    with pytest.raises(UsageError, match="activation scales"):
        check_stages([ranges, ("group-tokens", {})])
    with pytest.raises(UsageError, match="activation scales"):
        check_stages([ranges, ("activation-ranges", {}), ("log-attention", {})])
    for stage, options in (("group-tokens", {"channels": True}), ("log-attention", {})):
        order = [ranges, ("activation-ranges", {}), (stage, options)]
        with pytest.raises(UsageError, match="simulated"):
            resolve_recipe(method="dgq", stages=tuple(order if stage == "group-tokens" else [*order[::2]]))


@pytest.mark.slow
def test_weights_that_were_made_for_other_groups_are_refused(
    artifacts: dict[str, Artifact], model_and_set: tuple[Path, Artifact], tmp_path: Path
) -> None:
    model, data = model_and_set
    own = tmp_path / "own.yaml"
    stages = [{"load-weights": {"checkpoint": str(artifacts["fold"].path)}}, "activation-ranges"]
    own.write_text(json.dumps({"method": "dgq", "weights": "int8", "stages": stages}))
    with pytest.raises(InvalidInputError, match="another smoothing"):
        qdeploy.calibrate(model, tmp_path / "out", recipe=own, calibration=data, effort="tiny")


# -- the whole way -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def little_effort() -> Any:
    efforts.EFFORTS[TINY.name] = TINY
    yield
    del efforts.EFFORTS[TINY.name]


@pytest.fixture(scope="module")
def model_and_set(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("set")
    data = qdeploy.collect(ddpm, folder / "set", samples=8, keep=4, steps=8)
    assert isinstance(data, Artifact)
    return ddpm, data


WHOLE: dict[str, dict[str, Any]] = {
    "fold": {"recipe": "w8a8-dgq"},
    "split": {"recipe": "w4a8-dgq", "timestep_groups": 2},
    "paper": {"recipe": "w4a6-dgq-paper", "timestep_groups": 2},
}


@pytest.fixture(scope="module")
def artifacts(
    model_and_set: tuple[Path, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """Checkpoints of the presets."""
    model, data = model_and_set
    folder = tmp_path_factory.mktemp("dgq")
    return {
        name: qdeploy.calibrate(model, folder / name, calibration=data, effort="tiny", **given)  # type: ignore[misc]
        for name, given in WHOLE.items()
    }


@pytest.mark.parametrize("name", WHOLE)
def test_a_loaded_checkpoint_computes_the_same_bits(artifacts: dict[str, Artifact], name: str) -> None:
    from safetensors.torch import load_file

    probe = load_file(artifacts[name].file(PROBE))
    inputs = {key.removeprefix("input."): value for key, value in probe.items() if key.startswith("input.")}
    denoiser = load_checkpoint(artifacts[name])
    with torch.no_grad():
        assert torch.equal(denoise(denoiser, inputs), probe["simulated"])
    assert relative(probe["reference"], probe["simulated"]) < (0.5 if name == "paper" else 0.2)


def test_the_paper_preset_groups_and_takes_logarithms(artifacts: dict[str, Artifact]) -> None:
    denoiser = load_checkpoint(artifacts["paper"])
    attentions = [module for module in denoiser.modules() if isinstance(module, AttentionQuantizers)]
    assert attentions
    assert all(isinstance(a.probabilities, LogQuantizer) and a.probabilities.bits == 6 for a in attentions)
    axes = {q.axis for layer in quantized_layers(denoiser).values() for q in layer.activation_quantizers}
    assert {1, -1} <= axes
    assert len(artifacts["paper"].facts.simulated) >= 3
    with pytest.raises(CapabilityError, match="simulation"):
        qdeploy.export(artifacts["paper"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fold", "split"])
def test_engines_compute_it_in_int8(artifacts: dict[str, Artifact], tmp_path: Path, name: str) -> None:
    """P25, P26: static scales, zero points of zero, one quantizer for q, k and v, and no kernel in float."""
    bundle = qdeploy.export(artifacts[name], tmp_path / "onnx", components=False)
    graph = ir.load(bundle.file("unet/model.onnx")).graph
    quantizing = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in quantizing:
        assert constant(node.inputs[1]) is not None
        assert len(node.inputs) < 3 or node.inputs[2] is None or not constant(node.inputs[2]).any()
        activation = node.op_type == "QuantizeLinear"
        assert constant(node.inputs[1]).ndim == (0 if activation or node.inputs[0].const_value is None else 1)
    layers = quantized_layers(load_checkpoint(artifacts[name]))
    shared = {id(layer.input_quantizers): len(layer.activation_quantizers) for layer in layers.values()}
    assert sum(node.op_type == "QuantizeLinear" for node in quantizing) <= sum(shared.values())
    if name == "fold":
        assert any(layer.smoothing is not None for layer in layers.values())
    else:
        assert any(layer.order is not None for layer in layers.values())
    engine = qdeploy.build_engine(bundle, tmp_path / "engine", backend="openvino", threads=1)
    measured = engine.measured
    if name == "split" or not int8_sums_saturate():  # without VNNI, 8-bit weights are computed in floats
        assert measured.int8_mac_share_of_meant == 1.0
    assert measured.parity.sqnr_db >= 45
