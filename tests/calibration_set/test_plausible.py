"""Rows and timesteps that no sampling trajectory has are refused by name before anything is calibrated from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.plausible import LARGEST, check_rows, check_timesteps
from qdeploy.calibration_set.shards import Shard, shard_name
from qdeploy.model.folder import open_model
from qdeploy.store.facts import RangeFacts
from qdeploy.system.errors import InvalidInputError
from tests.helpers import reseal

Damage = Callable[[dict[str, Tensor]], object]


def spoil(folder: Path, damage: Damage) -> CalibrationSet:
    """The set with its first shard changed, and all hashes made to fit."""
    file = folder / shard_name(0)
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    reseal(folder)
    return CalibrationSet.open(folder)


def check(folder: Path, ddpm: Path) -> None:
    model = open_model(ddpm)
    CalibrationSet.open(folder).check_fits(model, model.load())


@pytest.fixture
def folder(ddpm: Path, tmp_path: Path) -> Path:
    return collect(ddpm, tmp_path / "set", keep=2, samples=4, batch=4, steps=4).path


def test_a_set_as_it_was_collected_is_believed(folder: Path, ddpm: Path) -> None:
    check(folder, ddpm)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda x: x["input.sample"][3].fill_(1e30), r"row 3 of .*1e\+30 in 'sample'"),
        (lambda x: x["input.sample"][5].mul_(1e3), r"row 5 of .*'sample'.*no more than"),
        (lambda x: x["input.sample"].fill_(1e30), r"row \d of .*1e\+30 in 'sample'"),
        (lambda x: x["input.timestep"][6].fill_(-5), r"row 6 of .* is at timestep -5, .* 0 to 1000"),
        (lambda x: x["input.timestep"][2].fill_(2**60), r"row 2 of .* is at timestep 1\.15292e\+18"),
    ],
)
def test_an_outlying_row_is_named(folder: Path, ddpm: Path, damage: Damage, named: str) -> None:
    spoil(folder, damage)
    with pytest.raises(InvalidInputError, match=named) as refused:
        check(folder, ddpm)
    assert len(str(refused.value).splitlines()) == 1


def shard(folder: Path, **tensors: Tensor) -> Shard:
    rows = len(tensors["input.timestep"])
    index = {name: torch.arange(rows) for name in ("image", "call")}
    save_file({**tensors, **index}, folder / "rows.safetensors")
    return Shard(folder / "rows.safetensors")


@given(
    sigmas=st.lists(st.floats(1e-3, 1400), min_size=1, max_size=12, unique=True),
    images=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_noise_of_any_schedule_is_believed(
    tmp_path_factory: pytest.TempPathFactory, sigmas: list[float], images: int, seed: int
) -> None:
    """Variance-exploding trajectories fall from 1e3 to 1: their first rows are no outliers."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor(sigmas).repeat_interleave(images)
    noise = torch.randn(len(sigma), 2, 3, 3, generator=generator)
    sample = torch.randn(noise.shape, generator=generator) + sigma.view(-1, 1, 1, 1) * noise
    rows = {"input.sample": sample, "input.timestep": sigma}
    check_rows([shard(tmp_path_factory.mktemp("shard"), **rows)], "a set")


def test_an_empty_prompt_and_numbers_of_classes_are_no_outliers(tmp_path: Path) -> None:
    rows = {
        "input.timestep": torch.tensor([9, 9, 9, 1, 1, 1]),
        "input.sample": torch.ones(6, 1, 2, 2),
        "condition.text": torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]),
        "condition.class_labels": torch.tensor([1, 10**9]),
        "condition_row": torch.tensor([0, 1, 0, 1, 0, 1]),
    }
    check_rows([shard(tmp_path, **rows)], "a set")
    rows["condition.text"][1] *= 2 * LARGEST
    with pytest.raises(InvalidInputError, match=r"row 1 of a set, at timestep 9, holds 2e.06 in 'text'"):
        check_rows([shard(tmp_path, **rows)], "a set")


@pytest.mark.parametrize(
    ("timesteps", "training", "span"),
    [
        ([0, 999], 1000, None),
        ([-1.7, 1.1], None, RangeFacts(low=-1.7, high=1.1, slope=None, offset=None)),
        ([0.0, 1.0], 1000, RangeFacts(low=0.0, high=1.0, slope=1e-3, offset=0.0)),
        ([-0.25, 0.5], None, None),
    ],
)
def test_timesteps_of_schedulers_are_believed(
    timesteps: list[float], training: int | None, span: RangeFacts | None
) -> None:
    check_timesteps(torch.tensor(timesteps), training, span, "a set")


@pytest.mark.parametrize(("timesteps", "training"), [([5.0, -5.0], 1000), ([2**60], None), ([1200], 1000)])
def test_timesteps_of_none_are_refused(timesteps: list[float], training: int | None) -> None:
    with pytest.raises(InvalidInputError, match="but the model is called with"):
        check_timesteps(torch.tensor(timesteps), training, None, "a set")
