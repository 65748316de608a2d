"""The zoo's ``scenes``: loads as any Stable Diffusion does, follows prompts, and its judge can be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdeploy.evaluate.attribute_network import FOLDER, AttributeNetwork
from qdeploy.evaluate.features import FeatureNetwork
from qdeploy.evaluate.metrics.attributes import Tally, attribute_accuracy
from qdeploy.evaluate.metrics.frechet import fd_local
from qdeploy.evaluate.scene_captions import caption, wanted
from qdeploy.model.folder import open_model
from qdeploy.model.pipeline import generate
from tools.zoo import train_scenes
from tools.zoo.judge_scenes import held_out_prompts, sampled, seen_prompts
from tools.zoo.scene_text import TOKENS, tokenize, words, write_tokenizer
from tools.zoo.train_scenes_reader import drawn, worsened
from tools.zoo.train_scenes_vae import crops, pictures, standardize
from tools.zoo.training import Draws

MODEL = open_model("scenes")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return MODEL.pipeline()


@pytest.fixture(scope="module")
def network() -> AttributeNetwork:
    return AttributeNetwork.load(MODEL.path / FOLDER)


# -- the attribute network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("worse", [False, True], ids=["clean", "worsened"])
def test_attributes_of_held_out_drawings_are_read_back(network: AttributeNetwork, worse: bool) -> None:
    draws = Draws.of(99, 7)
    images, scenes, _, _ = drawn(150, draws, held_out=True)
    tally = Tally()
    shown = worsened(images, draws) if worse else images
    for scene, reading in zip(scenes, network.read((shown + 1) / 2), strict=True):
        tally.add(caption(scene), reading)
    assert {name: value["accuracy"] >= 0.97 for name, value in tally.result().items()} == dict.fromkeys(
        ("shape", "colour", "size", "count", "relation", "background"), True
    )


def test_places_are_read_to_two_pixels(network: AttributeNetwork) -> None:
    images, scenes, layouts, _ = drawn(40, Draws.of(98, 1))
    for scene, layout, reading in zip(scenes, layouts, network.read((images + 1) / 2), strict=True):
        assert len(reading.things) == len(scene.things)
        found = np.array([[thing.x, thing.y] for thing in reading.things])
        apart = np.hypot(*(found[:, None] - layout.centres[None]).transpose(2, 0, 1))
        assert apart.min(axis=1).max() < 2


def test_pictures_of_other_scenes_are_judged_wrong(network: AttributeNetwork) -> None:
    images, scenes, _, _ = drawn(100, Draws.of(97, 1))
    exchanged = [caption(scene) for scene in scenes[1:] + scenes[:1]]
    accuracy = attribute_accuracy((images + 1) / 2, exchanged, network)
    assert accuracy["colour"]["accuracy"] < 0.4
    assert accuracy["shape"]["accuracy"] < 0.5


def test_an_empty_picture_shows_nothing(network: AttributeNetwork) -> None:
    (reading,) = network.read(torch.full((1, 3, 64, 64), 0.96))
    assert reading.things == ()
    assert reading.background == "white"


def test_fd_local_tells_drawings_from_noise() -> None:
    folder = MODEL.path / "features"
    draws = Draws.of(96, 1)
    real = (drawn(192, draws, held_out=True)[0] + 1) / 2
    noisy = (real + 0.2 * torch.randn(real.shape, generator=draws.torch)).clamp(0, 1)
    assert fd_local(noisy, folder)["fd_local"] > 10 * fd_local(real, folder)["fd_local"]
    trunk = AttributeNetwork.load(MODEL.path / FOLDER).trunk
    features = FeatureNetwork.load(folder)
    assert torch.equal(trunk.features(real[:4]), features.features(real[:4]))


# -- the autoencoder and the tokenizer ---------------------------------------------------------------------


def test_the_autoencoder_keeps_what_is_in_a_picture(pipeline: Any, network: AttributeNetwork) -> None:
    draws = Draws.of(95, 1)
    images, scenes, _, _ = drawn(120, draws, held_out=True)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    accuracy = attribute_accuracy((decoded.clamp(-1, 1) + 1) / 2, [caption(s) for s in scenes], network)
    assert all(value["accuracy"] >= 0.9 for value in accuracy.values())


def test_standardizing_latents_leaves_decoded_pictures_as_they_were() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4)
    images = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        mean, deviation = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        decoded = vae.decode(before.mean).sample
        standardize(vae, mean, deviation)
        after = vae.encode(images).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-5)
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(2), atol=1e-5)
    assert torch.allclose(after.std * deviation[:, None, None], before.std, atol=1e-5)


def test_crops_are_parts_around_a_thing() -> None:
    parts = crops(24, Draws.of(3, 1))
    assert parts.shape == (24, 3, 32, 32)
    assert bool((parts.amax((2, 3)) - parts.amin((2, 3))).amax(1).gt(0.2).all())
    assert torch.equal(parts, crops(24, Draws.of(3, 1)))
    assert pictures(2, Draws.of(3, 1)).shape == (2, 3, 64, 64)


def test_every_word_of_a_caption_is_one_token_and_no_text_is_unknown(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    assert [word for word in words() if len(tokenizer(word).input_ids) != 3] == []
    for text in held_out_prompts(64):
        tokens = tokenizer(text).input_ids
        assert len(tokens) == len(text.split()) + 2 <= TOKENS
        assert set(text.split()) <= set(words())
    odd = tokenizer("Zebra, 7 жук!").input_ids[1:-1]
    assert len(odd) > 5
    assert tokenizer.eos_token_id not in odd


def test_the_tokenizer_is_made_the_same_every_time(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "made")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "made" / name).read_text() == (MODEL.path / "tokenizer" / name).read_text()
    from transformers import CLIPTokenizer

    shipped_tokenizer = CLIPTokenizer.from_pretrained(MODEL.path / "tokenizer")
    made_tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "made")
    texts = [*held_out_prompts(16), "Zebra, 7 жук!"]
    assert made_tokenizer(texts).input_ids == shipped_tokenizer(texts).input_ids


# -- the model ---------------------------------------------------------------------------------------------


def test_it_is_a_stock_stable_diffusion(pipeline: Any) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    stock = StableDiffusionPipeline.from_pretrained(MODEL.path, local_files_only=True)
    assert type(pipeline) is StableDiffusionPipeline
    assert isinstance(stock.unet, UNet2DConditionModel)
    assert {"CrossAttnDownBlock2D", "DownBlock2D"} == set(stock.unet.config.down_block_types)
    assert stock.safety_checker is None
    assert stock.unet.dtype == stock.vae.dtype == stock.text_encoder.dtype == torch.float32
    size = sum(file.stat().st_size for file in MODEL.path.rglob("*") if file.is_file())
    assert size <= 40e6


def test_guidance_and_prompts_change_the_picture_and_seeds_do(pipeline: Any) -> None:
    def one(prompt: str, guidance: float, seed: int) -> torch.Tensor:
        return generate(pipeline, [seed], 5, [prompt], guidance).values

    first = one("a large red circle on a white background", 4.0, 0)
    assert torch.equal(first, one("a large red circle on a white background", 4.0, 0))
    for other in (
        one("a large blue star on a white background", 4.0, 0),
        one("a large red circle on a white background", 1.0, 0),
        one("a large red circle on a white background", 4.0, 1),
    ):
        assert (first - other).abs().mean() > 0.005


def test_it_follows_prompts_that_training_never_saw(pipeline: Any, network: AttributeNetwork) -> None:
    prompts = held_out_prompts(32, seed=5)
    images = sampled(pipeline, prompts, steps=12, guidance=4.0, seed=50).clamp(0, 1)
    accuracy = attribute_accuracy(images, prompts, network)
    # By chance 1/5, 1/6, 1/4 and 1/2; relations are not learned yet, as the model's card says.
    assert accuracy["shape"]["accuracy"] >= 0.4
    assert accuracy["colour"]["accuracy"] >= 0.7
    assert accuracy["background"]["accuracy"] >= 0.9
    assert accuracy["size"]["accuracy"] >= 0.75
    assert accuracy["count"]["accuracy"] >= 0.6
    exchanged = attribute_accuracy(images, prompts[1:] + prompts[:1], network)
    assert exchanged["colour"]["accuracy"] < 0.5 * accuracy["colour"]["accuracy"]


def test_held_out_prompts_are_of_every_kind() -> None:
    asked = [wanted(prompt) for prompt in held_out_prompts(16)]
    assert [asked_ is not None and asked_.relation is not None for asked_ in asked] == [
        False,
        False,
        True,
        True,
    ] * 4


def test_calibration_prompts_describe_no_held_out_scene() -> None:
    seen, held_out = (
        {wanted(prompt) for prompt in prompts(count)}
        for prompts, count in ((seen_prompts, 256), (held_out_prompts, 256))
    )
    assert None not in seen
    assert not seen & held_out


@pytest.mark.slow
def test_a_finished_model_is_trained_further(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_scenes, "SCENES", 500)
    folder = tmp_path / "scenes"
    shutil.copytree(MODEL.path, folder)
    (folder / "training.log").unlink()
    train_scenes.train_denoiser(folder, pipeline.vae, seed=1, steps=2, device="cpu")
    (record,) = (json.loads(line) for line in (folder / "training.log").read_text().splitlines())
    assert record["loss"] < 0.5  # an untrained network's is 1
    assert not [file for file in folder.rglob("*.json") if str(tmp_path) in file.read_text()]
    further = open_model(folder).pipeline()
    texts = tokenize(further.tokenizer, held_out_prompts(4))
    with torch.no_grad():
        before, after = pipeline.text_encoder(texts)[0], further.text_encoder(texts)[0]
    assert 0 < (after - before).abs().mean() < 0.2 * before.abs().mean()


def test_timesteps_of_training_are_all_drawn_and_those_in_the_middle_more_often() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([train_scenes.timesteps_of(generator) for _ in range(400)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    counts = torch.bincount(drawn // 100, minlength=10) / len(drawn)
    assert counts.min() > 0.4 * (1 - train_scenes.MIDDLE) / 10
    assert counts[3:6].mean() > 1.2 / 10
