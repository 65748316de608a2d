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
    assert quantizer.clock is not None
    for timestep, entry in ((999, 0), (701, 0), (700, 1), (300, 2), (0, 2)):
        with quantizer.clock.at(torch.tensor([timestep])):
            found = quantizer.scale[quantizer.clock.index(quantizer.edges)]
        assert float(found) == float(delta[entry]), timestep


def test_quests_entries_serve_the_timesteps_below_their_own(ddpm: Path, tmp_path: Path) -> None:
    made = published(ddpm, "quest", activations="asymmetric", steps=2)
    checkpoint = imported(made, "quest", ddpm, tmp_path, timesteps=[900, 400])
    assert checkpoint.facts.simulated == ["activations have a zero point for each timestep"]
    layer = quantized_layers(load_checkpoint(checkpoint))["conv_out"]
    ((delta, _),) = made.inputs["conv_out"]
    quantizer = layer.activation_quantizers[0]
    assert quantizer.clock is not None
    for timestep, entry in ((900, 0), (401, 0), (400, 1), (3, 1)):
        with quantizer.clock.at(torch.tensor([timestep])):
            assert float(quantizer.scale[quantizer.clock.index(quantizer.edges)]) == float(delta[entry])


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
    of_engine = sample(engine, tmp_path / "pictures", samples=2, steps=4, scheduler="ddim")
    of_checkpoint = sample(checkpoint, tmp_path / "simulated", samples=2, steps=4, scheduler="ddim")
    pictures = [torch.tensor(np.asarray(load(made))) for made in (of_engine, of_checkpoint)]
    difference = (pictures[0].float() - pictures[1].float()).abs()
    assert difference.mean() < 6  # of 255


def load(samples: Any) -> Any:
    from safetensors.numpy import load_file

    return load_file(samples.path / "images.safetensors")["images"]
