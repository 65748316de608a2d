"""DGQ's groups along the im2col matrix: the same product, less error, and no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qdeploy
from qdeploy.calibrate.groups import cluster, extremes
from qdeploy.calibrate.input_groups import set_group_scales
from qdeploy.calibrate.methods import dgq_patches
from qdeploy.calibrate.run_stages import run_stages
from qdeploy.model.inputs import denoise
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.modes import full_precision, weights_only
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.patches import AXES, PIXELS, ROWS, PatchQuantizer, shifted
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.state import read_state
from qdeploy.recipe import effort as efforts
from qdeploy.recipe.formats import Format, int4, int8, uint8
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import check_stages
from qdeploy.store.artifact import Artifact
from qdeploy.store.probe import PROBE
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.workflows import calibrate as run_module
from tests.helpers import TINY, MemoryRows, calibrating, relative, tiny_unet

DATA = MemoryRows.noisy()
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1},
]
RECIPE: dict[str, Any] = {"method": "dgq", "activations": "int8", "target": "simulated"}
RANGES = (("weight-ranges", {}), ("activation-ranges", {}))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def convolution(channels: int = 4, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 6, **{"kernel_size": 3, **options}).requires_grad_(False)


def picture(rows: int = 3, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(rows, channels, size, size, generator=seeded())


def grouped(
    inner: nn.Conv2d, x: Tensor, along: str, groups: int, number_format: Format = int8
) -> tuple[QuantizedLayer, Tensor]:
    """A layer with groups made from one input, and the group of each row or pixel."""
    layer = QuantizedLayer(inner, None, number_format)
    layer.activation_quantizers[0].set(*to_scale(x.min(), x.max(), number_format))
    low, high = extremes(inner, x)[along]
    found = {f"{along}.low": low.amin(0), f"{along}.high": high.amax(0)}
    labels = cluster(found[f"{along}.low"], found[f"{along}.high"], groups, seeded())
    set_group_scales(layer.quantize_patches(), found, along, labels, AXES[along])
    return layer, labels


def by_definition(inner: nn.Conv2d, x: Tensor, along: str, labels: Tensor, number_format: Format) -> Tensor:
    """The im2col matrix [B, positions × C, L] formed and quantized, each group in its own range."""
    matrix = torch.cat([seen.flatten(2) for _, _, seen in shifted(inner, x)], 1)
    scale, zero = to_scale(x.min(), x.max(), number_format)
    part = (x.max() - x.min()) / (matrix.max() - matrix.min())
    quantized = torch.empty_like(matrix)
    for group in labels.unique():
        own = (slice(None), labels == group) if along == ROWS else (slice(None), slice(None), labels == group)
        low, high = matrix[own].min().clamp(max=0), matrix[own].max().clamp(min=0)
        if number_format.symmetric:
            share = torch.maximum(-low, high) / matrix.abs().max()
            own_scale, own_zero = scale * share, zero
        else:
            own_scale, own_zero = to_scale(low * part, high * part, number_format)
        quantized[own] = fake_quantize(
            matrix[own], own_scale, own_zero, number_format.qmin, number_format.qmax
        )
    weight = inner.weight.permute(0, 2, 3, 1).flatten(1)
    height = next(shifted(inner, x))[2].shape[2]
    assert inner.bias is not None
    product = weight @ quantized + inner.bias[:, None]
    return product.view(*product.shape[:2], height, -1)


# -- the product -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("along", [ROWS, PIXELS])
def test_the_unfolded_product_is_the_convolution(options: dict[str, Any], along: str) -> None:
    inner, x = convolution(**options), picture()
    layer, _ = grouped(inner, x, along, 2)
    (quantizer,) = layer.activation_quantizers
    quantizer.scale = quantizer.scale * 1e-6  # steps too fine to be seen, in codes that never end
    quantizer.format = Format("wide", 32, -(2**40), 2**40)
    assert relative(inner(x), layer(x)) < 1e-4


@pytest.mark.parametrize("options", [option for option in GEOMETRIES if "groups" not in option], ids=str)
@pytest.mark.parametrize("along", [ROWS, PIXELS])
@pytest.mark.parametrize("number_format", [int8, uint8, int4], ids=lambda f: f.name)
def test_it_is_the_quantized_im2col_matrix_times_the_weight(
    options: dict[str, Any], along: str, number_format: Format
) -> None:
    """P15, P17: the definition, with the matrix formed."""
    inner, x = convolution(**options), picture() * torch.logspace(-1, 1, 4)[:, None, None]
    layer, labels = grouped(inner, x, along, 3, number_format)
    assert len(labels.unique()) == 3
    assert relative(by_definition(inner, x, along, labels, number_format), layer(x)) < 1e-5


@pytest.mark.parametrize("along", [ROWS, PIXELS])
@pytest.mark.parametrize("number_format", [int8, uint8], ids=lambda f: f.name)
def test_one_group_quantizes_to_the_values_of_one_scale_bit_for_bit(
    along: str, number_format: Format
) -> None:
    """P15: padding is a code too (DGQ-3), so that it does not matter whether it is quantized."""
    inner, x = convolution(padding=1), picture() + 0.5
    layer, labels = grouped(inner, x, along, 1, number_format)
    assert not labels.any()
    plain = QuantizedLayer(inner, None, number_format)
    plain.activation_quantizers[0].set(*to_scale(x.min(), x.max(), number_format))
    (quantizer,), (other,) = layer.activation_quantizers, plain.activation_quantizers
    for number, ((*_, seen), (*_, expected)) in enumerate(
        zip(shifted(inner, x), shifted(inner, other(x)), strict=True)
    ):
        assert torch.equal(quantizer(seen, number), expected)
    assert relative(plain(x), layer(x)) < 1e-6


@pytest.mark.parametrize(("along", "place"), [(PIXELS, (slice(None), slice(None), 3, 5)), (ROWS, None)])
def test_planted_outliers_are_isolated_and_cost_the_rest_nothing(along: str, place: Any) -> None:
    """P16: pixels that stand out; channels do for rows, in all kernel positions that see them."""
    x = picture(8)
    x[place if place else (slice(None), 2)] *= 50
    inner = convolution(padding=1)
    plain, _ = grouped(inner, x, along, 1)
    layer, labels = grouped(inner, x, along, 2)
    wide = labels.nonzero().flatten().tolist()
    positions = range(9)
    expected = (
        [row * 8 + column for row in (2, 3, 4) for column in (4, 5, 6)]
        if along == PIXELS
        else [position * 4 + 2 for position in positions]
    )
    assert wide == expected
    errors = [float((each(x) - inner(x)).square().mean()) for each in (plain, layer)]
    assert errors[1] < errors[0] * (0.6 if along == ROWS else 0.3)


def test_an_offset_may_have_a_scale_that_its_channel_has_not() -> None:
    """What tells rows from input channels: with a stride, kernel positions see different pixels."""
    x = picture(8)
    x[:, :, ::2, ::2] *= 50  # position (0, 0) alone reads these
    layer, labels = grouped(convolution(kernel_size=2, stride=2), x, ROWS, 2)
    assert labels.view(4, 4)[0].tolist() == [1, 1, 1, 1]
    assert not labels.view(4, 4)[1:].any()
    plain, _ = grouped(layer.inner, x, ROWS, 1)  # type: ignore[arg-type]
    exact = layer.inner(x)
    assert (layer(x) - exact).square().mean() < 0.5 * (plain(x) - exact).square().mean()


def test_the_im2col_matrix_is_never_formed() -> None:
    """Nine times the input would be: each kernel position is quantized and multiplied on its own."""
    inner, x = convolution(channels=8, padding=1), picture(2, 8, 16)
    layer, _ = grouped(inner, x, PIXELS, 2)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        layer(x)
    assert largest <= 2 * 8 * 18 * 18


def test_gradients_reach_scales_and_input() -> None:
    inner, x = convolution(padding=1), picture().requires_grad_()
    layer, _ = grouped(inner, x.detach(), ROWS, 2)
    (quantizer,) = layer.activation_quantizers
    quantizer.scale = quantizer.scale.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert quantizer.scale.grad is not None
    assert (quantizer.scale.grad != 0).any()


def test_another_number_of_pixels_is_refused() -> None:
    layer, _ = grouped(convolution(padding=1), picture(), PIXELS, 2)
    with pytest.raises(InvalidInputError, match="64 pixels, not 36"):
        layer(picture(size=6))


def test_nothing_of_it_is_frozen_for_export() -> None:
    layer, _ = grouped(convolution(), picture(), ROWS, 2)
    with pytest.raises(CapabilityError, match="forms no im2col matrix"):
        layer.activation_quantizers[0].freeze()


def test_switched_off_it_is_the_layer() -> None:
    inner, x = convolution(padding=1), picture()
    layer, _ = grouped(inner, x, ROWS, 2)
    for off in (full_precision, weights_only):
        with off(layer):
            assert torch.equal(layer(x), inner(x))


# -- the stage ---------------------------------------------------------------------------------------------


def staged(output: Path, *, timestep_groups: int = 1, weights: str = "int8", **options: Any) -> Any:
    """A session that has run the stage behind plain ranges."""
    stages = (*RANGES, ("group-patches", options))
    with calibrating(
        tiny_unet(), DATA, output, **RECIPE, stages=stages, weights=weights, timestep_groups=timestep_groups
    ) as session:
        run_stages(session)
    return session


def output_of(session: Any) -> Tensor:
    with torch.no_grad():
        return denoise(session.denoiser, DATA.inputs(range(8)))


def patched(session: Any) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(session.denoiser)
    return {
        path: layer
        for path, layer in layers.items()
        if any(isinstance(quantizer, PatchQuantizer) for quantizer in layer.activation_quantizers)
    }


def test_one_group_of_patches_is_one_scale_bit_for_bit(tmp_path: Path) -> None:
    """P15, DGQ-11: one group is per-tensor quantization, says so, and is no simulation."""
    one = staged(tmp_path / "one", groups=1)
    with calibrating(tiny_unet(), DATA, tmp_path / "none", **RECIPE, stages=RANGES) as plain:
        run_stages(plain)
    assert not patched(one)
    assert torch.equal(output_of(one), output_of(plain))
    assert one.report["patch_groups"]["simulated"] == 0
    assert one.report["patch_groups"]["left"]["one group"] > 0
    assert not one.recipe.simulated()


def test_the_report_counts_the_convolutions_that_are_simulated(tmp_path: Path) -> None:
    session = staged(tmp_path / "out", groups=4)
    found, counts = patched(session), session.report["patch_groups"]
    assert counts["simulated"] == len(found) == sum(counts["along"].values()) > 0
    assert counts["simulated"] + sum(counts["left"].values()) == len(session.layers)
    assert all(isinstance(layer.inner, nn.Conv2d) and not layer.split for layer in found.values())
    assert counts["left"]["quantizes the halves of a concatenation"] > 0
    assert counts["left"]["no convolution"] > 0


@pytest.mark.parametrize("along", [ROWS, PIXELS])
def test_the_dimension_can_be_given(tmp_path: Path, along: str) -> None:
    session = staged(tmp_path / "out", along=along)
    axes = {layer.activation_quantizers[0].axis for layer in patched(session).values()}
    assert axes == {AXES[along]}
    assert set(session.report["patch_groups"]["along"]) == {along}


@pytest.mark.parametrize("along", [ROWS, PIXELS])
def test_a_network_with_planted_outliers_gains(tmp_path: Path, along: str) -> None:
    """P16: one pixel, or one channel, behind every normalisation is twenty times as large; the rest is closer."""
    where: Any = (..., 5, 5) if along == PIXELS else (slice(None), 1)
    data = MemoryRows.noisy(size=16)

    def plant(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.ndim == 4:
            output[where] *= 20
        return output

    errors = []
    for groups in (1, 4):
        denoiser = tiny_unet(size=16)
        for module in denoiser.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(plant)
        stages = (*RANGES, ("group-patches", {"groups": groups, "along": along}))
        with calibrating(denoiser, data, tmp_path / str(groups), **RECIPE, stages=stages) as session:
            run_stages(session)
            inputs = data.inputs(session.rows()[:16])
            with torch.no_grad():
                error = denoise(session.denoiser, inputs)
                with full_precision(session.denoiser):
                    error -= denoise(session.denoiser, inputs)
        error[..., 3:8, 3:8] = 0  # where the planted pixel is read
        errors.append(float(error.norm()))
    assert errors[1] < 0.6 * errors[0]


def test_groups_of_timesteps_scale_all_groups_of_patches(tmp_path: Path) -> None:
    """DGQ-4: dimension and groups stay over timesteps; one factor varies, by the timestep's value."""
    session = staged(tmp_path / "out", groups=3, timestep_groups=2)
    found = patched(session)
    assert found
    for layer in found.values():
        (quantizer,) = layer.activation_quantizers
        assert quantizer.banked
        ratio = quantizer.scale[0] / quantizer.scale[1]
        assert torch.allclose(ratio, ratio[:1])
    quantized = output_of(session)
    with full_precision(session.denoiser):
        assert relative(output_of(session), quantized) < 0.1


class Stopped(BaseException):
    """As sudden as a signal."""


@pytest.mark.slow
def test_a_stopped_run_continues_with_the_same_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (*RANGES, ("group-patches", {"groups": 3}), ("learn-scales", {}))

    def run(output: Path) -> tuple[dict[str, Tensor], Any]:
        with calibrating(tiny_unet(), DATA, output, **RECIPE, stages=stages) as session:
            run_stages(session)
        return read_state(session.denoiser), session.report["patch_groups"]

    expected, counts = run(tmp_path / "whole")
    assert any(name.endswith(".patches") for name in expected)

    def stop(*args: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(dgq_patches, "set_group_scales", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    found, again = run(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert again == counts


def test_channels_that_have_groups_are_left_as_they_are(tmp_path: Path) -> None:
    channels = ("group-channels", {"form": "fold", "check": False})
    stages = (channels, *RANGES, ("group-patches", {"groups": 2}))
    with calibrating(tiny_unet(), DATA, tmp_path / "out", **RECIPE, stages=stages) as session:
        run_stages(session)
        report = json.loads((session.draft.content / f"{session.component}/groups.json").read_text())
    counts = report["patches"]["counts"]
    assert counts == session.report["patch_groups"]
    assert counts["left"]["its channels have groups"] > 0
    assert report["counts"]["grouped"] > 0
    assert set(report["patches"]["layers"]) == set(patched(session)) or counts["simulated"] == 0


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "positive number, not 0"),
        ({"groups": True}, "whole number, not True"),
        ({"groups": 2.5}, "whole number, not 2.5"),
        ({"along": "channels"}, "auto, rows, pixels"),
    ],
    ids=str,
)
def test_patches_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "out", **RECIPE, stages=RANGES) as session,
        pytest.raises(UsageError, match=message),
    ):
        dgq_patches.GroupPatches(**options).run(session)


def test_patches_without_activations_or_ranges_are_refused(tmp_path: Path) -> None:
    with (
        calibrating(tiny_unet(), DATA, tmp_path / "out", method="minmax", activations="none") as session,
        pytest.raises(UsageError, match="activations are 'none'"),
    ):
        dgq_patches.GroupPatches().run(session)
    with pytest.raises(UsageError, match="needs activation scales"):
        check_stages([("weight-ranges", {}), ("group-patches", {})])


def test_a_target_with_engines_is_refused_before_any_work(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({"method": "dgq", "stages": [*map(named, RANGES), "group-patches"]}))
    monkeypatch.setattr(run_module, "model_of", lambda model: pytest.fail("work has begun"))
    for target in ("portable", "openvino", "tensorrt", "onnxruntime"):
        with pytest.raises(
            UsageError, match=f"target {target} cannot run stage group-patches: a conv.*im2col"
        ):
            qdeploy.calibrate(ddpm, tmp_path / "out", recipe=own, target=target)
    assert not (tmp_path / "out").exists()


def named(stage: tuple[str, dict[str, Any]]) -> str:
    return stage[0]


# -- the whole way -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    efforts.EFFORTS[TINY.name] = TINY
    folder = tmp_path_factory.mktemp("patches")
    data = qdeploy.collect(ddpm, folder / "set", samples=8, keep=4, steps=8)
    own = folder / "own.yaml"
    stages = [*map(named, RANGES), {"group-patches": {"groups": 4}}]
    own.write_text(json.dumps({"method": "dgq", "target": "simulated", "stages": stages}))
    made = qdeploy.calibrate(ddpm, folder / "out", recipe=own, calibration=data, effort=TINY.name)  # type: ignore[arg-type]
    del efforts.EFFORTS[TINY.name]
    assert isinstance(made, Artifact)
    return made


def test_a_loaded_checkpoint_computes_the_same_patches(checkpoint: Artifact) -> None:
    probe = load_file(checkpoint.file(PROBE))
    inputs = {key.removeprefix("input."): value for key, value in probe.items() if key.startswith("input.")}
    denoiser = load_checkpoint(checkpoint)
    assert any(isinstance(module, PatchQuantizer) for module in denoiser.modules())
    with torch.no_grad():
        assert torch.equal(denoise(denoiser, inputs), probe["simulated"])


def test_the_checkpoint_says_that_it_is_simulated_and_how_much_of_it(checkpoint: Artifact) -> None:
    (reason,) = checkpoint.facts.simulated
    assert reason.startswith("stage group-patches: a convolution kernel forms no im2col matrix")
    report = json.loads(checkpoint.file("unet/groups.json").read_text())
    assert report["patches"]["counts"] == checkpoint.stage_reports["patch_groups"]
    assert len(report["patches"]["layers"]) > 0


def test_export_and_build_engine_refuse_it_with_the_reason(checkpoint: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=r"is a simulation and cannot be exported: .*im2col"):
        qdeploy.export(checkpoint, tmp_path / "onnx")
    with pytest.raises((CapabilityError, InvalidInputError)) as refused:
        qdeploy.build_engine(checkpoint, tmp_path / "engine", backend="openvino")
    assert "im2col" in str(refused.value)
    assert not (tmp_path / "onnx").exists()
    assert not (tmp_path / "engine").exists()


def test_the_recipe_resolves_to_a_labelled_simulation() -> None:
    recipe = resolve_recipe(**RECIPE, stages=(*RANGES, ("group-patches", {})))
    assert [reason for reason in recipe.simulated() if "im2col" in reason]
