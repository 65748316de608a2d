"""A whole pipeline in one file becomes a folder; what is no such file is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdeploy.model.folder import open_model
from qdeploy.model.importing.run import import_model
from qdeploy.system.errors import InvalidInputError
from tests.models.compvis import FirstStage, UNetModel, config
from tests.models.pipelines import TEXT_WIDTH, make_text_encoder

Run = Callable[..., Result]
WORDS = {
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": TEXT_WIDTH,
}
UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, **WORDS}


@pytest.fixture(scope="module")
def source() -> dict[str, torch.nn.Module]:
    """Networks of Stable Diffusion's layout, with random weights, by the prefix of their names in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        stage = config({"context_dim": 1}, quantized=False)["model"]["params"]["first_stage_config"]["params"]
        networks = {
            "model.diffusion_model": UNetModel(**UNET),
            "first_stage_model": FirstStage(**stage),
            "cond_stage_model.transformer": make_text_encoder()[0],
        }
        for network in networks.values():
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    return networks


@pytest.fixture(scope="module")
def state(source: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    found = {}
    for prefix, network in source.items():
        for name, tensor in network.state_dict().items():
            text = prefix.startswith("cond") and not name.startswith("text_model.")
            found[f"{prefix}.{'text_model.' if text else ''}{name}"] = tensor.clone()
    return found


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same kind, of which nothing but configurations and the tokenizer may be read."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    encoder, tokenizer = make_text_encoder()
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True
    )
    folder = tmp_path_factory.mktemp("like") / "config"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_computes_what_its_source_computes(
    suffix: str, source: dict[str, torch.nn.Module], state: dict[str, Tensor], like: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 7}, file)
    else:
        save_file(state, file)
    model = import_model(file, tmp_path / "folder", config=like)
    pipeline = model.pipeline()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, TEXT_WIDTH)
    with torch.no_grad():
        t = torch.tensor([1, 731])
        expected = source["model.diffusion_model"](x, t, context)
        torch.testing.assert_close(pipeline.unet(x, t, context).sample, expected, atol=1e-5, rtol=1e-5)
        pictures = source["first_stage_model"].decode(x)  # type: ignore[operator]
        torch.testing.assert_close(pipeline.vae.decode(x).sample, pictures, atol=1e-5, rtol=1e-5)
        ids = torch.arange(6)[None]
        encoded = source["cond_stage_model.transformer"](ids)[0]
        torch.testing.assert_close(pipeline.text_encoder(ids)[0], encoded, atol=1e-6, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", file.name]  # nothing is left behind


def test_a_single_file_given_to_another_verb_is_imported_as_the_message_says(
    qdeploy: Run, state: dict[str, Tensor], like: Path, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    refused = qdeploy("inspect", tmp_path / "model.safetensors")
    assert "qdeploy import" in refused.stderr
    made = qdeploy("import", tmp_path / "model.safetensors", "--config", like, "-o", tmp_path / "folder")
    assert made.exit_code == 0, made.stderr
    assert qdeploy("inspect", tmp_path / "folder").exit_code == 0
    again = qdeploy("import", tmp_path / "model.safetensors", "--config", like, "-o", tmp_path / "folder")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_what_is_no_whole_model_is_refused(state: dict[str, Tensor], like: Path, tmp_path: Path) -> None:
    def refused(
        match: str, name: str = "m.safetensors", config: Path | None = like, **changed: Tensor
    ) -> None:
        if changed:
            save_file({key.replace("__", "."): value for key, value in changed.items()}, tmp_path / name)
        with pytest.raises(InvalidInputError, match=match):
            import_model(tmp_path / name, tmp_path / "out", config=config)
        assert not (tmp_path / "out").exists()

    refused("holds no model that diffusers knows", a=torch.zeros(2), b__weight=torch.zeros(3))
    refused("is a LoRA and no model", lora_unet_mid__lora_down__weight=torch.zeros(2, 2))
    refused("does not exist", name="nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("no model")
    refused("was not read|cannot be read", name="text.ckpt")
    (tmp_path / "text.safetensors").write_text("no model")
    refused("truncated or no safetensors file", name="text.safetensors")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused("holds no model: a list", name="list.ckpt")
    part = {
        name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.decoder")
    }
    save_file(part, tmp_path / "m.safetensors")
    refused("does not hold")
    save_file(state, tmp_path / "m.safetensors")
    refused("no folder of a diffusers pipeline", config=tmp_path)
    # Without a configuration it is one of those that diffusers knows by its tensors, or named as none.
    refused("name a diffusers folder of the same kind with --config", config=None)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemError('it ran')",))


def test_a_pickle_with_code_is_refused_and_does_not_run(like: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(InvalidInputError, match="nothing in it was executed"):
        import_model(tmp_path / "bomb.ckpt", tmp_path / "out", config=like)


def test_an_output_that_is_there_is_replaced_on_demand_alone(
    state: dict[str, Tensor], like: Path, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "m.safetensors")
    shutil.copytree(like, tmp_path / "out")
    model = import_model(tmp_path / "m.safetensors", tmp_path / "out", config=like, overwrite=True)
    assert load_file(model.weights[0])
    assert open_model(tmp_path / "out").sha256 == model.sha256
