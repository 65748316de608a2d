from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.export.run import export
from qdeploy.store.artifact import Artifact
from tests.models import ddpm_folder, stable_diffusion_folder


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def stable_diffusion_engine(stable_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The full-precision engine of the tiny Stable Diffusion model."""
    folder = tmp_path_factory.mktemp("sd")
    prompts = ["a cat", "two dogs"]
    # The set tells the exporter how many tokens this pipeline's prompts have.
    data = collect(stable_diffusion, folder / "set", steps=2, samples=2, inference_steps=4, prompts=prompts)
    assert isinstance(data, Artifact)
    return build_engine(
        export(stable_diffusion, folder / "onnx", calibration=data), folder / "engine", threads=1
    )
