"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from qdeploy.calibration_set.collect import collect
from qdeploy.engines import measure_build
from qdeploy.engines.build import build_engine
from qdeploy.engines.measure import latency
from qdeploy.export.run import export
from qdeploy.plots import pictures
from qdeploy.store.artifact import Artifact
from qdeploy.system.progress import verbosity
from tests.models import ddpm_folder, stable_diffusion_folder

# One thread per worker: the suite runs in as many workers as there are cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Fixtures of a module are made before those of its tests: they, too, leave the user's cache alone.
os.environ["QDEPLOY_CACHE"] = tempfile.mkdtemp(prefix="qdeploy-tests-")


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


@pytest.fixture(scope="session", autouse=True)
def no_idle_work() -> Iterator[None]:
    """Sets are not drawn: a picture takes longer than a tiny set. Few calls are timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "range_heat_map", lambda ranges, path: None)
        patch.setattr(measure_build, "latency", partial(latency, seconds=0.0))
        yield


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random unconditional pipeline."""
    return ddpm_folder(tmp_path_factory.mktemp("models") / "ddpm")


@pytest.fixture(scope="session")
def ddpm_engine(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The full-precision engine of the tiny DDPM model."""
    folder = tmp_path_factory.mktemp("ddpm")
    return build_engine(export(ddpm, folder / "onnx"), folder / "engine", threads=1)


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def stable_diffusion_bundle(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny Stable Diffusion model in full precision, as ONNX."""
    folder = tmp_path_factory.mktemp("sd")
    prompts = ["a cat", "two dogs"]
    # The set tells the exporter how many tokens this pipeline's prompts have.
    data = collect(stable_diffusion, folder / "set", keep=2, samples=2, steps=4, prompts=prompts)
    assert isinstance(data, Artifact)
    return export(stable_diffusion, folder / "onnx", calibration=data)


@pytest.fixture(scope="session")
def stable_diffusion_engine(
    stable_diffusion_bundle: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The full-precision engine of the tiny Stable Diffusion model."""
    return build_engine(stable_diffusion_bundle, tmp_path_factory.mktemp("sd-engine") / "engine", threads=1)


@pytest.fixture
def qdeploy() -> Callable[..., Result]:
    """Run a command line in this process."""
    from qdeploy.cli import main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; skipped where mounting is not permitted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
