"""Paired sampling: the same seeds for both, none that calibration has seen, whatever the batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.evaluate.quality import FIRST_SEED, SEEDS_APART, QualityPlan, Trajectories, measure_quality
from qdeploy.model import pipeline
from qdeploy.model.folder import open_model
from qdeploy.model.media import Media
from qdeploy.system.errors import InvalidInputError, UsageError
from tests.models import dit_folder, stable_diffusion_folder


class Scaled(nn.Module):
    """A denoiser whose predictions are off by a factor."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["return_dict"] = False
        return _Output(self.inner(*args, **kwargs)[0] * self.factor)


class _Output(tuple[Tensor]):
    def __new__(cls, sample: Tensor) -> _Output:
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> Tensor:
        return self[0]


def changed(plan: QualityPlan, **options: Any) -> QualityPlan:
    return dataclasses.replace(plan, sampling=dataclasses.replace(plan.sampling, **options))


def test_a_model_is_equal_to_itself(ddpm: Path, small: QualityPlan) -> None:
    model = open_model(ddpm)
    measured = measure_quality(Trajectories(model, small), model.load())
    assert measured["sqnr_db"]["median"] == measured["sqnr_db"]["worst"] == 200
    assert measured["psnr_db"] == 100
    assert measured["drift"]["worst"] == 0
    assert "fd_local" not in measured


def test_sqnr_is_measured_on_the_reference_trajectory(ddpm: Path, small: QualityPlan) -> None:
    """A factor is 20 dB at every timestep, however far the subject's own trajectory goes astray."""
    model = open_model(ddpm)
    measured = measure_quality(Trajectories(model, small), Scaled(model.load(), 1.1))
    assert list(measured["sqnr_db"]["by_timestep"].values()) == pytest.approx([20] * 3, abs=0.01)
    drifts = list(measured["drift"]["by_timestep"].values())
    assert drifts[0] == 0
    assert drifts[-1] > 0.01
    assert measured["psnr_db"] < 60


def test_what_is_measured_does_not_depend_on_the_batch_or_on_memory(ddpm: Path, small: QualityPlan) -> None:
    model = open_model(ddpm)
    subject = Scaled(model.load(), 0.97)
    one = measure_quality(Trajectories(model, small), subject)
    forgetful = Trajectories(model, changed(small, batch=3), kept_bytes=0)
    other = measure_quality(forgetful, subject)
    assert one["psnr_db"] == pytest.approx(other["psnr_db"], abs=0.05)
    assert one["sqnr_db"]["median"] == pytest.approx(other["sqnr_db"]["median"], abs=0.05)
    assert other == measure_quality(forgetful, subject)


def test_no_image_has_an_ordinary_seed(
    ddpm: Path, small: QualityPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    generate = pipeline.generate

    def spying(pipe: Any, seeds: list[int], *rest: Any, **options: Any) -> Media:
        used.extend(seeds)
        return generate(pipe, seeds, *rest, **options)

    monkeypatch.setattr(pipeline, "generate", spying)
    list(Trajectories(open_model(ddpm), small).reference())
    assert set(used) == {FIRST_SEED + SEEDS_APART * small.sampling.seed + image for image in range(4)}
    assert min(used) > 2**32


def test_another_seed_gives_other_images(ddpm: Path, small: QualityPlan) -> None:
    model = open_model(ddpm)
    one, other = (next(Trajectories(model, changed(small, seed=seed)).reference()).images for seed in (1, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch": -1}, {"seed": -1}, {"seed": 2**20}, {"prompts": ()}]
)
def test_impossible_plans_are_refused(small: QualityPlan, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        changed(small, **wrong)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"keep": 0}])
def test_nothing_to_compare_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        QualityPlan(**wrong)


def test_a_subject_that_computes_nan_is_refused(ddpm: Path, small: QualityPlan) -> None:
    model = open_model(ddpm)
    with pytest.raises(InvalidInputError, match="NaN"):
        measure_quality(Trajectories(model, small), Scaled(model.load(), float("nan")))


def test_conditional_models_are_compared_too(tmp_path: Path, small: QualityPlan) -> None:
    model = open_model(dit_folder(tmp_path / "dit"))
    measured = measure_quality(Trajectories(model, small), model.load())
    assert measured["sqnr_db"]["worst"] == 200


def test_prompts_are_asked_for_and_used(tmp_path: Path, small: QualityPlan) -> None:
    model = open_model(stable_diffusion_folder(tmp_path / "sd"))
    with pytest.raises(UsageError, match="prompts"):
        next(Trajectories(model, small).reference())
    images = [
        next(Trajectories(model, changed(small, prompts=prompts)).reference()).images
        for prompts in (("a cat", "a dog"), ("a cat", "7 houses"))
    ]
    assert torch.equal(images[0][0], images[1][0])
    assert not torch.equal(images[0][1], images[1][1])
