"""Published quantized networks become checkpoints, code by code; files that are not what they claim are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from qdeploy.engines.build import build_engine
from qdeploy.export.run import export
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import quantized_layers
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Checkpoint
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.workflows.import_checkpoint import import_checkpoint
from tests.models import ddpm_folder
from tests.models.published import Published, published


def imported(made: Published, method: str, model: Path, folder: Path, **options: Any) -> Checkpoint:
    return import_checkpoint(
        made.save(folder / "file.pth", method), model, folder / "out", method=method, **options
    )


def assert_same_codes(made: Published, checkpoint: Checkpoint) -> None:
    layers = quantized_layers(load_checkpoint(checkpoint))
    assert layers.keys() == made.codes.keys()
    for path, codes in made.codes.items():
        for quantizer, wanted in zip(layers[path].weight_quantizers, codes, strict=True):
            np.testing.assert_array_equal(
                np.squeeze(quantizer.codes.numpy()), np.squeeze(wanted), err_msg=path
            )


@pytest.mark.parametrize("names", ["diffusers", "compvis", "ddim"])
@pytest.mark.parametrize("method", ["qdiffusion", "tfmq", "quest", "dgq", "brecq"])
def test_codes_are_those_of_an_independent_computation(
    method: str, names: str, ddpm: Path, tmp_path: Path
) -> None:
    made = published(ddpm, method, names=names, split=names != "diffusers")
    checkpoint = imported(made, method, ddpm, tmp_path)
    assert checkpoint.facts.precision == "W4Afp"
    assert checkpoint.facts.simulated == []
    assert_same_codes(made, checkpoint)


def test_layers_that_the_script_leaves_out_stay_in_float(ddpm: Path, tmp_path: Path) -> None:
    """Met when TFMQ-DM's own code quantized `digits`: some layers have torch's names, and the ends unused scales."""
    made = published(ddpm, "tfmq", names="ddim", left_out=True)
    assert "model.conv_in.wqtizer.delta" in made.state
    assert "model.down.0.downsample.conv.weight" in made.state
    checkpoint = imported(made, "tfmq", ddpm, tmp_path)
    assert_same_codes(made, checkpoint)
    assert "conv_in" not in made.codes


def test_nearest_rounding_where_nothing_was_learned(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "dgq", learned=False)
    assert_same_codes(made, imported(made, "dgq", ddpm, tmp_path))


def test_scales_of_activations_are_the_files_and_shared_only_where_they_are_equal(
    ddpm: Path, tmp_path: Path
) -> None:
    made = published(ddpm, "qdiffusion", names="compvis", split=True, activations="asymmetric")
    checkpoint = imported(made, "qdiffusion", ddpm, tmp_path)
    assert (checkpoint.facts.precision, checkpoint.facts.simulated) == ("W4A8", [])
    layers = quantized_layers(load_checkpoint(checkpoint))
    for path, grids in made.inputs.items():
        for quantizer, (delta, zero_point) in zip(layers[path].activation_quantizers, grids, strict=True):
            assert (float(quantizer.scale), int(quantizer.zero_point)) == (
                float(delta[0]),
                int(zero_point[0]),
            )
    query, key = (layers[f"mid_block.attentions.0.to_{letter}"] for letter in "qk")
    assert query.input_quantizers is key.input_quantizers  # one convolution in the file


def test_tables_by_timestep_are_looked_up_by_its_value(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "tfmq", activations="symmetric", steps=3)
    checkpoint = imported(made, "tfmq", ddpm, tmp_path, timesteps="900,500,100")
    assert checkpoint.facts.simulated == []
    layer = quantized_layers(load_checkpoint(checkpoint))["down_blocks.0.resnets.0.conv1"]
    ((delta, _),) = made.inputs["down_blocks.0.resnets.0.conv1"]
    quantizer = layer.activation_quantizers[0]
    assert quantizer.current_timestep is not None
    for timestep, entry in ((999, 0), (701, 0), (700, 1), (300, 2), (0, 2)):
        with quantizer.current_timestep.at(torch.tensor([timestep])):
            found = quantizer.scale[quantizer.current_timestep.index(quantizer.edges)]
        assert float(found) == float(delta[entry]), timestep


def test_quests_entries_serve_the_timesteps_below_their_own(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "quest", activations="asymmetric", steps=2)
    checkpoint = imported(made, "quest", ddpm, tmp_path, timesteps=[900, 400])
    assert checkpoint.facts.simulated == ["activations have a zero point for each timestep"]
    layer = quantized_layers(load_checkpoint(checkpoint))["conv_out"]
    ((delta, _),) = made.inputs["conv_out"]
    quantizer = layer.activation_quantizers[0]
    assert quantizer.current_timestep is not None
    for timestep, entry in ((900, 0), (401, 0), (400, 1), (3, 1)):
        with quantizer.current_timestep.at(torch.tensor([timestep])):
            assert float(quantizer.scale[quantizer.current_timestep.index(quantizer.edges)]) == float(
                delta[entry]
            )


def test_one_range_over_all_timesteps_makes_a_network_that_engines_run(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "tfmq", activations="asymmetric", steps=2)
    checkpoint = imported(made, "tfmq", ddpm, tmp_path, timesteps=[900, 100], merge_timesteps=True)
    assert checkpoint.facts.simulated == []
    quantizer = quantized_layers(load_checkpoint(checkpoint))["conv_out"].activation_quantizers[0]
    ((delta, zero),) = made.inputs["conv_out"]
    scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
    assert -zero_point * scale <= (-zero * delta).min() + scale / 2
    assert (255 - zero_point) * scale >= ((255 - zero) * delta).max() - scale / 2


# -- what is refused -------------------------------------------------------------------------------------------


def broken(made: Published, what: str) -> None:
    name = "model.conv_in.weight_quantizer.delta"
    if what == "nan":
        made.state[name][0] = torch.nan
    elif what == "missing":
        made.state = {
            key: value for key, value in made.state.items() if ".mid_block.resnets.0.conv1." not in key
        }
    elif what == "surplus":
        for part in (
            "weight",
            "weight_quantizer.delta",
            "weight_quantizer.zero_point",
            "weight_quantizer.alpha",
        ):
            made.state[f"model.conv_extra.{part}"] = made.state[f"model.conv_in.{part}"]
    elif what == "scales":
        del made.state[name]
    elif what == "negative":
        made.state[name] *= -1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", "NaN or Inf in the scales of conv_in"),
        ("missing", "lacks 1 of the model's .* layers, first mid_block.resnets.0.conv1"),
        ("surplus", "quantized layers that the model lacks, first conv_extra"),
        ("scales", "lacks the scales of conv_in"),
        ("negative", "not positive"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_written(
    what: str, words: str, ddpm: Path, tmp_path: Path
) -> None:
    made = published(ddpm, "qdiffusion")
    broken(made, what)
    with pytest.raises(InvalidInputError, match=words):
        imported(made, "qdiffusion", ddpm, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file.pth"]


def test_another_network_is_refused_by_its_weights_and_by_its_shapes(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "qdiffusion")
    other, wide = ddpm_folder(tmp_path / "other", seed=1), ddpm_folder(tmp_path / "wide", channels=(8, 24))
    with pytest.raises(InvalidInputError, match="are not this model's"):
        imported(made, "qdiffusion", other, tmp_path)
    with pytest.raises(InvalidInputError, match="another network"):
        imported(made, "qdiffusion", wide, tmp_path)


class Executes:
    def __reduce__(self) -> Any:
        return (Path("executed").touch, ())


def test_a_pickle_that_executes_does_not(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qdeploy: Callable[..., Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.conv_in.weight": Executes()}, "evil.pth")
    result = qdeploy("import-checkpoint", "evil.pth", "--model", ddpm, "--method", "qdiffusion", "-o", "out")
    assert result.exit_code == 5
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("timesteps", ["100,900", "900,900", "900,x", "1000,1", "900,500,1", "-1,-2"])
def test_impossible_timesteps(timesteps: str, ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "tfmq", activations="symmetric", steps=2)
    with pytest.raises(UsageError):
        imported(made, "tfmq", ddpm, tmp_path, timesteps=timesteps)
    assert not (tmp_path / "out").exists()


def test_what_no_format_holds_is_said(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "quest", activations="symmetric")
    with pytest.raises(CapabilityError, match="257"):
        imported(made, "quest", ddpm, tmp_path)
    assert imported(made, "quest", ddpm, tmp_path, activations="none").facts.precision == "W4Afp"
    with pytest.raises(UsageError, match="unknown method"):
        import_checkpoint(tmp_path / "file.pth", ddpm, method="ptqd")


def test_a_file_of_another_method_is_told(ddpm: Path, tmp_path: Path) -> None:
    file = published(ddpm, "qdiffusion").save(tmp_path / "file.pth", "qdiffusion")
    with pytest.raises(InvalidInputError, match="lacks 'weight'"):
        import_checkpoint(file, ddpm, tmp_path / "out", method="tfmq")


# -- all the way ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.field
@pytest.mark.parametrize(
    ("method", "names", "options"),
    [
        ("qdiffusion", "ddim", {"activations": "asymmetric", "split": True}),
        ("tfmq", "compvis", {"activations": "symmetric", "steps": 4}),
        ("quest", "compvis", {"activations": "asymmetric"}),
        ("dgq", "diffusers", {"activations": "asymmetric"}),
        ("brecq", "compvis", {}),
    ],
)
def test_from_a_published_file_to_a_picture(
    method: str, names: str, options: dict[str, Any], ddpm: Path, tmp_path: Path
) -> None:
    made = published(ddpm, method, names=names, **options)
    checkpoint = imported(made, method, ddpm, tmp_path)
    engine = build_engine(export(checkpoint, tmp_path / "onnx"), tmp_path / "engine", threads=1)
    few: dict[str, Any] = {"samples": 2, "steps": 4, "scheduler": "ddim"}
    of_engine, simulated, full = (
        torch.tensor(load(sample(source, tmp_path / name, **few))).float()
        for name, source in (("pictures", engine), ("simulated", checkpoint), ("full", ddpm))
    )
    # Scales and roundings are random: a rounding that falls to the other side spreads through all steps. With other
    # scales the engine would differ by as much as quantization does.
    difference, of_quantization = ((simulated - each).abs().mean() for each in (of_engine, full))
    assert difference < 6 or difference < of_quantization / 3  # of 255


def load(samples: Any) -> Any:
    from safetensors.numpy import load_file

    return load_file(samples.path / "images.safetensors")["images"]


# -- attention -----------------------------------------------------------------------------------------------

OPERANDS = {"q": (0.05, 120), "k": (0.04, 130), "v": (0.03, 128), "w": (1 / 255, 0)}


def with_operands(made: Published, start: str, names: dict[str, str], softmax: float = 1 / 255) -> None:
    """Scales of the operands of one attention; ``names`` says which module holds each."""
    for operand, (delta, zero_point) in OPERANDS.items():
        scale = softmax if operand == "w" else delta
        name = f"model.{start}{names[operand]}.act_quantizer_{operand}"
        made.state[f"{name}.delta"] = torch.tensor(scale)
        made.state[f"{name}.zero_point"] = torch.tensor(float(zero_point))


def test_operands_of_cross_attention_in_the_names_of_stable_diffusion(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    made = published(stable_diffusion, "qdiffusion", names="compvis", activations="asymmetric", split=True)
    places = [name for name in made.state if name.endswith((".attn1.to_q.weight", ".attn2.to_q.weight"))]
    for name in places:
        start = name.removeprefix("model.").removesuffix(".to_q.weight")
        with_operands(made, start, dict.fromkeys("qkvw", ""), softmax=1 / 65535)
    checkpoint = imported(made, "qdiffusion", stable_diffusion, tmp_path)
    assert_same_codes(made, checkpoint)
    assert checkpoint.recipe is not None
    assert checkpoint.recipe["softmax"] == "uint16"
    assert checkpoint.facts.simulated
    found = [m for m in load_checkpoint(checkpoint).modules() if isinstance(m, AttentionQuantizers)]
    assert len(found) == len(places) == 8
    for attention in found:
        read = {name: (float(q.scale), int(q.zero_point)) for name, q in attention.named_children()}
        assert read["query"] == (pytest.approx(0.05), 120)
        assert read["probabilities"] == (pytest.approx(1 / 65535), 0)
    in_float = import_checkpoint(
        tmp_path / "file.pth", stable_diffusion, tmp_path / "float", method="qdiffusion", float_attention=True
    )
    assert in_float.facts.simulated == []


def test_operands_that_were_scaled_before_have_the_steps_of_what_they_were(
    ddpm: Path, tmp_path: Path
) -> None:
    """LDM multiplies q and k by d^(-1/4) each, and quantizes that."""
    made = published(ddpm, "qdiffusion", names="compvis", activations="asymmetric")
    for block in ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"):
        places = {"q": "qkv_matmul", "k": "qkv_matmul", "v": "smv_matmul", "w": "smv_matmul"}
        with_operands(made, f"{block}.attention.", places)
    denoiser = load_checkpoint(imported(made, "qdiffusion", ddpm, tmp_path))
    attention = denoiser.get_submodule("mid_block.attentions.0")
    quantizers = attention.get_submodule("attention_quantizers")
    width = attention.inner_dim // attention.heads
    scales = {name: float(each.scale) for name, each in quantizers.named_children()}
    wanted = {"query": 0.05 * width**0.25, "key": 0.04 * width**0.25, "value": 0.03, "probabilities": 1 / 255}
    assert scales == pytest.approx(wanted)


# -- scales along axes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "shape", "axis"), [("to_q", (1, 1, 16), -1), ("to_q", (1, 16, 1), -2)])
def test_groups_of_dgq_lie_along_features_or_tokens(
    path: str, shape: tuple[int, ...], axis: int, ddpm: Path, tmp_path: Path
) -> None:
    made = published(ddpm, "dgq", activations="asymmetric")
    name = f"model.mid_block.attentions.0.{path}.aqtizer"
    delta = torch.rand(16) * 0.02 + 0.02
    made.steps[0][f"{name}.delta"] = delta.view(shape)
    made.steps[0][f"{name}.zero_point"] = torch.full(shape, 100.0)
    checkpoint = imported(made, "dgq", ddpm, tmp_path)
    assert "activations have scales along channels, tokens or pixels" in checkpoint.facts.simulated
    layer = quantized_layers(load_checkpoint(checkpoint))[f"mid_block.attentions.0.{path}"]
    quantizer = layer.activation_quantizers[0]
    assert quantizer.axis == axis
    torch.testing.assert_close(quantizer.scale, delta, rtol=0, atol=0)


def test_rows_of_the_im2col_matrix_are_quantized_as_unfolded(ddpm: Path, tmp_path: Path) -> None:
    """Against an explicit im2col, whose rows go channel by channel, position by position."""
    made = published(ddpm, "dgq", activations="asymmetric")
    path = "mid_block.resnets.0.conv1"
    delta = torch.rand(16 * 9) * 0.02 + 0.02
    made.steps[0][f"model.{path}.aqtizer.delta"] = delta.view(1, -1, 1)
    made.steps[0][f"model.{path}.aqtizer.zero_point"] = torch.full((1, 144, 1), 128.0)
    layer = quantized_layers(load_checkpoint(imported(made, "dgq", ddpm, tmp_path)))[path]
    x = torch.randn(2, 16, 4, 4)
    unfolded = torch.nn.functional.unfold(x, 3, padding=1)
    codes = (unfolded / delta[:, None]).round().add(128).clamp(0, 255)
    weight = layer.quantized_weights()[0].flatten(1)
    wanted = (weight @ ((codes - 128) * delta[:, None])).unflatten(2, (4, 4)) + layer.bias[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_eight_bits_are_kept_for_torch(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "qdiffusion", bits=8)
    checkpoint = imported(made, "qdiffusion", ddpm, tmp_path)
    assert checkpoint.facts.precision == "W8Afp"
    assert checkpoint.facts.simulated == ["no engine has a kernel for uint8 weights"]
    assert_same_codes(made, checkpoint)


def test_biases_that_a_method_tuned_are_the_files(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "quest")
    name = "model.mid_block.resnets.0.time_emb_proj.bias"
    made.state[name] = made.state[name] + 0.25
    layer = quantized_layers(load_checkpoint(imported(made, "quest", ddpm, tmp_path)))[
        "mid_block.resnets.0.time_emb_proj"
    ]
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias, made.state[name], rtol=0, atol=0)


def test_zero_points_outside_of_the_codes_are_kept(ddpm: Path, tmp_path: Path) -> None:
    """Channels whose weights are all of one sign have them, where ranges need not hold zero."""
    made = published(ddpm, "brecq")
    name = "model.conv_out.weight_quantizer.zero_point"
    made.state[name] = made.state[name] - 20
    checkpoint = imported(made, "brecq", ddpm, tmp_path)
    assert checkpoint.facts.simulated == []
    layer = quantized_layers(load_checkpoint(checkpoint))["conv_out"]
    zero_point = layer.weight_quantizers[0].zero_point
    assert isinstance(zero_point, torch.Tensor)
    assert torch.equal(zero_point.float(), made.state[name].flatten())
    assert float(zero_point.min()) < 0
    made.state[name] -= 200
    far = import_checkpoint(made.save(tmp_path / "far.pth", "brecq"), ddpm, tmp_path / "far", method="brecq")
    assert far.facts.simulated == [
        "codes of conv_out.weight.0 are further from their zero point than int8 reaches"
    ]
