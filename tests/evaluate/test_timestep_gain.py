"""The gain of groups is what the noise model says: the square of the spans, summed over time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.evaluate.timestep_gain import gain_db, timestep_gain
from qdeploy.network.current_timestep import midpoints
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import Format, int8, uint8
from qdeploy.store.artifact import Artifact
from qdeploy.workflows.calibrate import calibrate
from tests.evaluate.conftest import Way

Run = Callable[..., Result]


def bank_of(low: Tensor, high: Tensor, edges: Tensor, number_format: Format) -> dict[str, Tensor]:
    scale, zero_point = to_scale(low, high, number_format)
    return {"scale": scale, "zero_point": zero_point, "edges": edges}


@pytest.mark.parametrize("number_format", [int8, uint8])
def test_a_range_that_grows_tenfold_gains_what_the_sum_of_squares_says(number_format: Format) -> None:
    timesteps = torch.arange(10.0)
    spans = torch.linspace(1, 10, 10)
    bank = bank_of(-spans, spans, midpoints(timesteps), number_format)
    expected = 10 * math.log10(10 * 10**2 / float(spans.square().sum()))
    assert gain_db(bank, timesteps, number_format) == pytest.approx(expected, abs=0.05)
    halves = bank_of(
        torch.tensor([-1.0, -10.0]), torch.tensor([1.0, 10.0]), torch.tensor([4.5]), number_format
    )
    expected = 10 * math.log10(10 * 100 / (5 * 1 + 5 * 100))
    assert gain_db(halves, timesteps, number_format) == pytest.approx(expected, abs=0.05)


def test_a_range_that_stays_gains_nothing_and_none_loses() -> None:
    timesteps, edges = torch.arange(6.0), torch.tensor([1.5, 3.5])
    still = bank_of(torch.full((3,), -2.0), torch.full((3,), 3.0), edges, int8)
    assert gain_db(still, timesteps, int8) == pytest.approx(0)
    for seed in range(5):
        low, high = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
        for number_format in (int8, uint8):
            assert gain_db(bank_of(-low, high, edges, number_format), timesteps, number_format) >= 0


def test_one_asymmetric_scale_would_have_to_cover_what_every_group_covers() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0])
    bank = bank_of(low, high, torch.tensor([0.5]), uint8)
    assert gain_db(bank, torch.arange(2.0), uint8) == pytest.approx(10 * math.log10(4), abs=0.05)


@pytest.fixture(scope="module")
def grouped(way: Way) -> Artifact:
    checkpoint = calibrate(
        way.model,
        way.checkpoint.path.parent / "grouped",
        recipe="w8a8-minmax",
        effort="fast",
        calibration=way.checkpoint.path.parent / "set",
        timestep_groups=2,
    )
    assert isinstance(checkpoint, Artifact)
    return checkpoint


def test_of_a_checkpoint_it_is_the_gain_that_its_ranges_tell(grouped: Artifact) -> None:
    gain = timestep_gain(grouped)
    assert gain is not None
    ranges = load_file(grouped.file("unet/ranges.safetensors"))
    state = load_file(grouped.file("unet/quantized.safetensors"))
    gains = gain["by_tensor_db"]
    assert gain["groups"] == 2
    assert gains.keys() == {name.removesuffix(".low") for name in ranges if name.endswith(".low")}
    for name, value in gains.items():
        spans = torch.maximum(-ranges[f"{name}.low"], ranges[f"{name}.high"])
        early = ranges["timesteps"] <= state[f"{name}.edges"]
        noise = sum(int(part.sum()) * float(spans[part].max()) ** 2 for part in (early, ~early))
        assert value == pytest.approx(10 * math.log10(len(spans) * float(spans.max()) ** 2 / noise), abs=0.02)
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    assert gain["median_db"] == pytest.approx(median(gains.values()), abs=0.01)


def test_one_scale_for_all_timesteps_has_no_gain_to_show(way: Way, qdeploy: Run) -> None:
    assert timestep_gain(way.checkpoint) is None
    assert "timestep_gain" not in json.loads(qdeploy("inspect", way.checkpoint.path, "--json").stdout)


def test_inspect_names_the_best_ten_and_json_all(grouped: Artifact, qdeploy: Run) -> None:
    gain = json.loads(qdeploy("inspect", grouped.path, "--json").stdout)["timestep_gain"]
    assert gain == timestep_gain(grouped)
    names = list(gain["by_tensor_db"])
    assert len(names) > 10
    text = qdeploy("inspect", grouped.path).stdout
    shown = text[text.index("timestep gain") :]
    assert "median db" in shown
    words = shown.split()
    assert [name in words for name in names] == [True] * 10 + [False] * (len(names) - 10)


def test_a_damaged_checkpoint_is_described_without_it(
    grouped: Artifact, tmp_path: Path, qdeploy: Run
) -> None:
    copy = shutil.copytree(grouped.path, tmp_path / "copy")
    (copy / "unet" / "quantized.safetensors").write_bytes(b"spoilt")
    result = qdeploy("inspect", copy, "--json")
    assert result.exit_code == 5
    assert "timestep_gain" not in json.loads(result.stdout)
