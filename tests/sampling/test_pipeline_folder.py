"""A pipeline folder is all that a machine needs, and makes the pictures of the pipeline it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.engines.build import build_engine
from qdeploy.engines.components import read_precisions
from qdeploy.engines.drop_in.autoencoder import EngineAutoencoder
from qdeploy.engines.drop_in.text_encoder import EngineTextEncoder
from qdeploy.export.run import export
from qdeploy.sampling.pipeline_folder import load_pipeline
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Bundle, EngineFolder, open_artifact
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.machine import has_bf16

ARGUMENTS: dict[str, Any] = {"prompt": ["a cat", "two dogs"], "num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def folder(
    request: pytest.FixtureRequest,
    stable_diffusion_bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineFolder:
    """A pipeline folder in f32, away from the model that it was made from."""
    path = tmp_path_factory.mktemp(request.param)
    precisions = {"vae": "f32", "text_encoder": "f32"}
    options: dict[str, Any] = {"backend": request.param, "threads": 1, "components": precisions}
    build_engine(stable_diffusion_bundle, path / "here", **options)
    return open_artifact((path / "here").rename(path / "there"), EngineFolder)


def images(pipeline: Any, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return torch.as_tensor(pipeline(generator=generator, output_type="np", **arguments).images)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a - b).double().square().mean().log10())


def test_it_opens_as_the_stock_pipeline_and_makes_its_pictures(
    folder: EngineFolder, stable_diffusion: Path
) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    mine = load_pipeline(folder.path, threads=1)
    assert type(mine) is diffusers.StableDiffusionPipeline
    assert isinstance(mine.vae, EngineAutoencoder)
    assert isinstance(mine.text_encoder, EngineTextEncoder)
    parts = [part for part in mine.components.values() if isinstance(part, torch.nn.Module)]
    assert not sum(parameter.numel() for part in parts for parameter in part.parameters())
    torch.testing.assert_close(images(mine, **ARGUMENTS), images(stock, **ARGUMENTS), rtol=0, atol=1e-4)


def test_images_go_in_through_its_encoder(folder: EngineFolder, stable_diffusion: Path) -> None:
    kind = diffusers.StableDiffusionImg2ImgPipeline
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    arguments = ARGUMENTS | {"image": [picture, picture], "strength": 0.7}
    expected = images(kind.from_pretrained(stable_diffusion, safety_checker=None), **arguments)
    mine = kind(**load_pipeline(folder.path, threads=1).components, requires_safety_checker=False)
    torch.testing.assert_close(images(mine, **arguments), expected, rtol=0, atol=1e-4)


def test_decoders_take_any_size_and_number(folder: EngineFolder, stable_diffusion: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae")
    mine = load_pipeline(folder.path, threads=1).vae
    for shape in ((1, 4, 8, 8), (3, 4, 6, 10)):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(
                mine.decode(latents).sample, vae.decode(latents).sample, rtol=0, atol=1e-4
            )
    assert mine.decode(latents.bfloat16(), return_dict=False)[0].dtype == torch.bfloat16
    with pytest.raises(InvalidInputError, match=r"'latent_sample' of shape \[any, 4, any, any\]"):
        mine.decode(latents[:, :3])


def test_what_an_engine_cannot_do_is_said(folder: EngineFolder) -> None:
    pipeline = load_pipeline(folder.path, threads=1)
    with pytest.raises(CapabilityError, match="without hidden states"):
        pipeline(**ARGUMENTS, clip_skip=1)
    with pytest.raises(CapabilityError, match="enable_tiling"):
        pipeline.vae.enable_tiling()
    with pytest.raises(CapabilityError, match="copy its folder"):
        pipeline.vae.save_pretrained("anywhere")


@pytest.mark.parametrize("folder", ["openvino"], indirect=True)
def test_without_the_model_sample_makes_the_same_bytes(
    folder: EngineFolder, stable_diffusion: Path, tmp_path: Path
) -> None:
    """The folder's own components are used even where the model is at hand, so its absence changes nothing."""
    options: dict[str, Any] = {"count": 2, "steps": 3, "prompts": ["a cat", "two dogs"], "guidance": 4.0}
    assert stable_diffusion.exists()
    with_model = sample(folder.path, tmp_path / "with", **options)
    hidden = stable_diffusion.rename(stable_diffusion.with_name("hidden"))
    try:
        copy = Path(shutil.copytree(folder.path, tmp_path / "copy"))
        without = sample(copy, tmp_path / "without", **options)
    finally:
        hidden.rename(stable_diffusion)
    assert without.files == with_model.files
    assert without.sha256 == with_model.sha256


@pytest.mark.parametrize("folder", ["openvino"], indirect=True)
def test_a_changed_tokenizer_and_a_lost_component_are_noticed(folder: EngineFolder, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder.path, tmp_path / "changed"))
    file = next((changed / "tokenizer").glob("*.json"))
    file.write_text(file.read_text().replace("a", "b", 1))
    with pytest.raises(InvalidInputError, match=rf"damaged: the file tokenizer/{file.name} does not match"):
        load_pipeline(changed)
    lost = Path(shutil.copytree(folder.path, tmp_path / "lost"))
    (lost / "vae_decoder").rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match=r"damaged: the file vae_decoder/.* is missing"):
        sample(lost, tmp_path / "samples", prompts=["a cat"])
    assert not (tmp_path / "samples").exists()


@pytest.mark.skipif(not has_bf16(), reason="needs a processor with bf16")
def test_components_are_built_in_16_bits_unless_asked_otherwise(
    stable_diffusion: Path,
    stable_diffusion_bundle: Bundle,
    stable_diffusion_engine: EngineFolder,
    tmp_path: Path,
) -> None:
    assert stable_diffusion_engine.facts.pipeline.precision == {"vae": "bf16", "text_encoder": "bf16"}
    stock = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    assert psnr(images(load_pipeline(stable_diffusion_engine), **ARGUMENTS), images(stock, **ARGUMENTS)) > 40
    sizes = [
        stable_diffusion_engine.file(f"{part}/openvino_model.bin").stat().st_size
        for part in ("vae_decoder", "text_encoder")
    ]
    full = [
        stable_diffusion_bundle.file(f"{part}/model.onnx").stat().st_size
        for part in ("vae_decoder", "text_encoder")
    ]
    assert all(size < 0.7 * whole for size, whole in zip(sizes, full, strict=True))


def test_impossible_requests_are_refused(stable_diffusion_bundle: Bundle, ddpm: Path, tmp_path: Path) -> None:
    for precisions, message in (
        ({"unet": "f32"}, "the pipeline's engines are"),
        ({"vae": "w3a3"}, "computes in f32"),
    ):
        with pytest.raises(UsageError, match=message):
            build_engine(stable_diffusion_bundle, tmp_path / "engine", components=precisions)
    with pytest.raises(UsageError, match="none are built"):
        build_engine(stable_diffusion_bundle, tmp_path / "engine", components={"vae": "f32"}, pipeline=False)
    with pytest.raises(InvalidInputError, match="a denoiser alone"):
        build_engine(export(ddpm, tmp_path / "onnx"), tmp_path / "engine", pipeline=True)
    for text in ("vae", "vae=", "=f32", "vae=f32,", "a=b=c"):
        with pytest.raises(UsageError, match="NAME=PRECISION"):
            read_precisions(text)
    assert read_precisions("vae=f32, unet=bf16") == {"vae": "f32", "unet": "bf16"}
    for device, error in (("GPU", CapabilityError), ("TPU", UsageError)):
        with pytest.raises(error, match=device):
            build_engine(stable_diffusion_bundle, tmp_path / "engine", backend="openvino", device=device)
    assert not (tmp_path / "engine").exists()


def test_an_engine_without_its_pipeline_says_so(stable_diffusion_bundle: Bundle, tmp_path: Path) -> None:
    alone = build_engine(stable_diffusion_bundle, tmp_path / "alone", pipeline=False, threads=1)
    with pytest.raises(InvalidInputError, match="holds no text_encoder and no vae"):
        load_pipeline(alone)


@pytest.mark.slow
def test_a_safety_checker_stays_in_torch_and_is_said(
    stable_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=4, text_config=tiny, vision_config=tiny | {"image_size": 32, "patch_size": 16}
    )
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    model = diffusers.StableDiffusionPipeline(
        **pipeline.components
        | {
            "safety_checker": StableDiffusionSafetyChecker(config),
            "feature_extractor": CLIPImageProcessor(crop_size=32, size=32),
        }
    )
    model.save_pretrained(tmp_path / "model")
    bundle = export(tmp_path / "model", tmp_path / "onnx")
    assert "safety_checker stays in torch" in capsys.readouterr().err
    with pytest.raises(CapabilityError, match="safety_checker: there is no way"):
        build_engine(bundle, tmp_path / "engine", strict=True)
    engine = build_engine(bundle, tmp_path / "engine", threads=1)
    shutil.rmtree(tmp_path / "model")
    opened = load_pipeline(engine)
    assert type(opened.safety_checker) is StableDiffusionSafetyChecker
    assert json.loads(engine.file("model_index.json").read_text())["safety_checker"]
    assert len(images(opened, **ARGUMENTS)) == 2
