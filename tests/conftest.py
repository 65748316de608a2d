"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from qdeploy.system.progress import verbosity
from tests.models import ddpm_folder

# One thread per worker: the suite runs in as many workers as there are cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of GPUs need one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test does reaches the user's cache, or how much the next test says."""
    monkeypatch.setattr(verbosity, "level", 1)
    monkeypatch.setenv("QDEPLOY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random unconditional pipeline."""
    return ddpm_folder(tmp_path_factory.mktemp("models") / "ddpm")


@pytest.fixture
def qdeploy() -> Callable[..., Result]:
    """Run a command line in this process."""
    from qdeploy.cli import main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run
