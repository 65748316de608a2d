"""A trained network of others, with outliers in channels and timesteps: a floor for its quantization."""

from __future__ import annotations

from pathlib import Path
from subprocess import CalledProcessError

import pytest

from benchmarks.terrain import measure
from benchmarks.terrain_model import terrain_folder

FLOORS = {"202": 20.0, "1096": 15.0}  # dB, on seeds that nothing was calibrated on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("terrain")
    try:
        terrain_folder(made)
    except CalledProcessError:
        pytest.skip("the wheel that holds the network cannot be fetched")
    return made


@pytest.mark.slow
@pytest.mark.field
def test_outliers_of_channels_and_timesteps_leave_a_usable_network(folder: Path) -> None:
    (record,) = measure(folder, ["w8a8-smoothquant-outliers"], images=4)
    for timestep, floor in FLOORS.items():
        assert record["quantized"][timestep] >= floor, record
