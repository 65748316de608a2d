"""The zoo's ``digits-dit``: a stock DiTPipeline that shows the digit it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qdeploy.evaluate.features import FeatureNetwork
from qdeploy.model.folder import open_model
from qdeploy.model.pipeline import generate
from tools.zoo.train_digits import digits

MODEL = open_model("digits-dit")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return MODEL.pipeline()


def test_it_is_a_stock_dit(pipeline: Any) -> None:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    assert type(pipeline) is DiTPipeline
    assert isinstance(pipeline.transformer, DiTTransformer2DModel)
    size = sum(file.stat().st_size for file in MODEL.path.rglob("*") if file.is_file())
    assert size <= 8e6


def test_guided_samples_show_the_class_that_was_asked_for(pipeline: Any) -> None:
    classes = [number % 10 for number in range(20)]
    images = generate(pipeline, range(20), 8, [str(number) for number in classes], 4.0).values
    assert images.shape == (20, 1, 16, 16)
    with torch.no_grad():
        seen = FeatureNetwork.load(MODEL.path / "features")(images.clamp(0, 1) * 2 - 1).argmax(1)
    assert (seen == torch.tensor(classes)).float().mean() >= 0.9


def test_guidance_and_seeds_change_the_picture(pipeline: Any) -> None:
    def one(guidance: float, seed: int) -> torch.Tensor:
        return generate(pipeline, [seed], 4, ["3"], guidance).values

    assert torch.equal(one(4.0, 0), one(4.0, 0))
    assert (one(4.0, 0) - one(1.0, 0)).abs().mean() > 0.005
    assert (one(4.0, 0) - one(4.0, 1)).abs().mean() > 0.005


def test_the_autoencoder_keeps_held_out_digits(pipeline: Any) -> None:
    images = digits(train=False)[0][:64]
    with torch.no_grad():
        rebuilt = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    assert (rebuilt - images).square().mean().sqrt() < 0.03
