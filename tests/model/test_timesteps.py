"""Chosen timesteps and eta: held against DDIM's formula and against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import Result

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model
from qdeploy.model.pipeline import sample_images
from qdeploy.model.sampling import Sampling
from qdeploy.model.schedulers import scheduler_for
from qdeploy.model.timesteps import quadratic, with_timesteps
from qdeploy.system.errors import UsageError


def ddim(**config: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(clip_sample=False, **config)


def test_quadratic_timesteps_are_those_of_ddims_code() -> None:
    roots = [i * (800**0.5) / 99 for i in range(100)]
    assert set(quadratic(100, 1000)) <= {float(int(root**2 + 1e-9)) for root in roots} | {799.0, 800.0}
    assert len(quadratic(100, 1000)) == 96
    assert quadratic(100, 1000)[-3:] == (2.0, 1.0, 0.0)


@pytest.mark.parametrize("timesteps", [(901.0, 500.0, 77.0, 3.0), "quad"])
def test_each_step_of_ddim_goes_to_the_next_timestep_of_the_list(timesteps: Any) -> None:
    scheduler = with_timesteps(ddim(), timesteps, 5)
    scheduler.set_timesteps(50)
    times = scheduler.timesteps.tolist()
    assert times == list(map(int, quadratic(5, 1000) if timesteps == "quad" else timesteps))
    alphas = np.append(scheduler.alphas_cumprod.double().numpy(), 1.0)  # the last one stands for -1
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4))
    ours = torch.from_numpy(x)
    for t, after in zip(times, [*times[1:], -1], strict=True):
        noise = np.sin(3 * x)
        start = (x - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        ours = scheduler.step(torch.sin(3 * ours), torch.tensor(t), ours).prev_sample
        x = np.sqrt(alphas[after]) * start + np.sqrt(1 - alphas[after]) * noise
        np.testing.assert_allclose(ours.numpy(), x, rtol=1e-4, atol=1e-5)


def test_a_list_of_even_timesteps_is_the_stock_schedule(ddpm: Path) -> None:
    model = open_model(ddpm)
    made = []
    for chosen in (
        Sampling(steps=4, scheduler="ddim"),
        Sampling(scheduler="ddim", timesteps=[750, 500, 250, 0]),
    ):
        pipeline = model.pipeline()
        pipeline.scheduler = scheduler_for(chosen, pipeline.scheduler)
        made.append(sample_images(pipeline, chosen, range(2)).values)
    torch.testing.assert_close(*made, rtol=0, atol=0)


@pytest.mark.parametrize("scheduler", ["ddpm", "euler", "dpm++", "heun"])
def test_other_schedulers_take_a_list_too(scheduler: str) -> None:
    made = scheduler_for(Sampling(scheduler=scheduler, timesteps="901,500,77"), ddim())
    made.set_timesteps(10)
    assert dict.fromkeys(made.timesteps.tolist()) == dict.fromkeys([901.0, 500.0, 77.0])


def test_eta_reaches_a_pipeline_that_does_not_know_the_word(ddpm: Path) -> None:
    model, chosen = open_model(ddpm), Sampling(steps=3, scheduler="ddim", eta=0.7)
    pipeline = model.pipeline()
    pipeline.scheduler = scheduler_for(chosen, pipeline.scheduler)
    mine = sample_images(pipeline, chosen, range(2)).values
    stock = diffusers.DDIMPipeline(
        pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    )
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    theirs = stock(batch_size=2, generator=seeds, num_inference_steps=3, eta=0.7, output_type="np").images
    np.testing.assert_allclose(mine.numpy().transpose(0, 2, 3, 1), theirs, atol=1e-5)


def test_a_calibration_set_has_the_chosen_timesteps(ddpm: Path, tmp_path: Path) -> None:
    made = collect(ddpm, tmp_path / "set", scheduler="ddim", timesteps="900,400,30", keep=3, samples=2)
    assert CalibrationSet.open(made.path).timesteps.unique().tolist() == [30, 400, 900]


@pytest.mark.parametrize(
    ("timesteps", "scheduler"),
    [
        ("1,2", "ddim"),
        ("9,9", "ddim"),
        ("1000,1", "ddim"),
        ("-1", "ddim"),
        ("nan", "ddim"),
        ("10.5,2", "ddim"),
        ("quadratic", "ddim"),
        ("9,5", "pndm"),
    ],
)
def test_impossible_timesteps_are_a_sentence_and_exit_code_2(
    timesteps: str, scheduler: str, ddpm: Path, tmp_path: Path, qdeploy: Callable[..., Result]
) -> None:
    for verb in (("sample", ddpm, "-n", 1), ("collect", ddpm, "--keep", 1, "-n", 1)):
        asked = ("--scheduler", scheduler, f"--timesteps={timesteps}", "-o", tmp_path / "out")
        assert qdeploy(*verb, *asked).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_other_schedulers_take_no_eta() -> None:
    with pytest.raises(UsageError, match="PNDMScheduler takes no eta"):
        scheduler_for(Sampling(scheduler="pndm", eta=0.5), ddim())
