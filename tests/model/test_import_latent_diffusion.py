"""A checkpoint of latent diffusion becomes a folder that samples what its source samples."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result

from qdeploy.model.importing.run import import_model
from qdeploy.model.pipeline import generate
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.models.compvis import BEDROOMS, CHURCHES, IMAGENET, LatentDiffusion

Run = Callable[..., Result]
WAYS = {"vq": BEDROOMS, "kl": CHURCHES, "classes": IMAGENET}


def noise(source: LatentDiffusion, seeds: list[int]) -> torch.Tensor:
    shape = (1, source.channels, source.image_size, source.image_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("way", WAYS)
def test_the_imported_folder_samples_what_its_source_samples(way: str, tmp_path: Path) -> None:
    source = LatentDiffusion(WAYS[way])
    file, _ = source.save(tmp_path / "original")
    model = import_model(file, tmp_path / "model")
    seeds, labels = [3, 4], way == "classes"
    options: dict[str, Any] = {"prompts": ["7", "7"], "guidance": 3.0} if labels else {}
    images = generate(model.pipeline(), seeds, 4, **options)
    expected = source.sample(noise(source, seeds), 4, *((7, 3.0) if labels else ()))
    assert expected.std() > 0.05  # there is something to compare
    torch.testing.assert_close(images.values, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_stock_diffusers_opens_the_imported_folder(way: str, tmp_path: Path) -> None:
    import diffusers

    file, _ = LatentDiffusion(WAYS[way]).save(tmp_path / "original")
    model = import_model(file, tmp_path / "model")
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    expected = model.load().state_dict()
    found = getattr(stock, model.component).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert stock.scheduler.config.steps_offset == 1


def test_the_moving_average_is_taken_where_there_is_one(tmp_path: Path) -> None:
    source = LatentDiffusion(BEDROOMS)
    plain = import_model(source.save(tmp_path / "a")[0], tmp_path / "plain")
    file, description = source.save(tmp_path / "b", averaged=True)
    assert import_model(file, tmp_path / "averaged").sha256 == plain.sha256
    without = copy.deepcopy(BEDROOMS)
    without["model"]["params"]["use_ema"] = False
    description.write_text(yaml.safe_dump(without))
    assert import_model(file, tmp_path / "other").sha256 != plain.sha256


def test_notes_of_a_training_framework_are_read_without_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    file, _ = LatentDiffusion(BEDROOMS).save(tmp_path / "original")
    content = torch.load(file, weights_only=True)
    torch.save(content | {"callbacks": {kind: {"best": 1.5}, "one": kind()}}, file)
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    assert import_model(file, tmp_path / "model").class_name == "UNet2DModel"
    assert "pytorch_lightning" not in sys.modules


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(config)
    *way, last = path.split(".")
    part = made["model"]["params"]
    for name in way:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return made


TEXT = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {}}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "unet_config.target",
            "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel",
            "another architecture",
        ),
        ("first_stage_config.target", "ldm.models.autoencoder.IdentityFirstStage", "another architecture"),
        ("cond_stage_config", TEXT, "the condition BERTEmbedder"),
        ("conditioning_key", "concat", "conditions by concat"),
        ("unet_config.params.use_new_attention_order", True, "use_new_attention_order"),
        ("unet_config.params.use_spatial_transformer", True, "spatial transformers and no classes"),
        ("unet_config.params.channel_mult", None, "does not describe the whole architecture"),
        ("unet_config.params.channel_mult", [1, 3], "do not (fit|belong)"),
        ("unet_config.params.num_res_blocks", 2, "do not (fit|belong)"),
        ("unet_config.params.in_channels", 4, "other channels"),
        ("first_stage_config.params.n_embed", 128, "do not fit"),
        ("parameterization", "v", "predicts v"),
        ("unet_config", None, "not the YAML of a latent diffusion model"),
    ],
)
def test_a_yaml_of_another_architecture_is_refused(
    path: str, value: Any, words: str, bedrooms: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed(BEDROOMS, path, value)))
    with pytest.raises(InvalidInputError, match=words):
        import_model(bedrooms, tmp_path / "model", yaml=tmp_path / "other.yaml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.yaml"]


@pytest.fixture(scope="module")
def bedrooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LatentDiffusion(BEDROOMS).save(tmp_path_factory.mktemp("bedrooms"))[0]


def test_files_that_do_not_belong_together_are_refused(bedrooms: Path, tmp_path: Path) -> None:
    yaml_file = bedrooms.with_name("config.yaml")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "autoencoder.ckpt")
    with pytest.raises(InvalidInputError, match="no checkpoint of latent diffusion"):
        import_model(tmp_path / "autoencoder.ckpt", tmp_path / "model", yaml=yaml_file)
    (tmp_path / "text.yaml").write_text("a: &b [1]\nc: *b\n")
    with pytest.raises(InvalidInputError, match="cannot be read as YAML"):
        import_model(bedrooms, tmp_path / "model", yaml=tmp_path / "text.yaml")
    with pytest.raises(InvalidInputError, match="cannot be read as YAML"):
        import_model(bedrooms, tmp_path / "model", yaml=tmp_path / "nowhere.yaml")
    ten = copy.deepcopy(IMAGENET)
    ten["model"]["params"]["cond_stage_config"]["params"]["n_classes"] = 11
    (tmp_path / "ten.yaml").write_text(yaml.safe_dump(ten))
    with pytest.raises(InvalidInputError, match="11 classes"):
        import_model(bedrooms, tmp_path / "model", yaml=tmp_path / "ten.yaml")
    with pytest.raises(UsageError, match="give one of them"):
        import_model(bedrooms, tmp_path / "model", yaml=yaml_file, config=tmp_path)


@pytest.mark.slow
@pytest.mark.field
@pytest.mark.parametrize("way", ["kl", "classes"])
def test_an_imported_model_goes_the_whole_way(way: str, qdeploy: Run, tmp_path: Path) -> None:
    LatentDiffusion(WAYS[way]).save(tmp_path / "original")

    def run(*words: object) -> Result:
        done = qdeploy(*words)
        assert done.exit_code == 0, done.stderr
        return done

    conditions = ("--prompt", 3, "--prompt", 8, "--guidance", 3) if way == "classes" else ()
    model, small = tmp_path / "model", ("--steps", 4, *conditions)
    run("import", tmp_path / "original" / "model.ckpt", "-o", model)
    run("collect", model, "-o", tmp_path / "set", "-n", 4, "--keep", 2, *small)
    run("calibrate", model, "-o", tmp_path / "ck", "--method", "minmax", "--calibration", tmp_path / "set")
    if way == "classes":  # what is left is that of any network
        run("sample", tmp_path / "ck", "-o", tmp_path / "images", "-n", 2, *small)
        return
    run("export", tmp_path / "ck", "-o", tmp_path / "onnx", "--no-pipeline")
    run("build-engine", tmp_path / "onnx", "-o", tmp_path / "engine", "--backend", "openvino", "--threads", 1)
    run("sample", tmp_path / "engine", "-o", tmp_path / "images", "-n", 2, *small)
    checked = run(
        "check", tmp_path / "engine", "--reference", model, "--samples", 2, "--keep", 2, "--json", *small
    )
    assert json.loads(checked.stdout)["passed"]
