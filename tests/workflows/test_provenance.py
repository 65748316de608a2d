"""Equal requests make equal bytes whatever lies where, one pipeline has one identity, and a stop loses no report."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qdeploy.store.artifact as store
from qdeploy.calibration_set.collect import collect
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.sampling.sample import sample
from qdeploy.store.manifest import damage
from qdeploy.system.errors import UsageError
from qdeploy.system.hashing import sha256_file
from qdeploy.workflows.calibrate import calibrate

PROMPTS = ("a", "b")


@pytest.fixture
def pipeline(stable_diffusion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stable_diffusion, tmp_path / "model"))


def change(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_never_gives_the_autoencoder_of_before(pipeline: Path, tmp_path: Path) -> None:
    first = export(pipeline, tmp_path / "onnx")
    change(next((pipeline / "vae").glob("*.safetensors")))
    with pytest.raises(UsageError, match="another artifact"):
        export(pipeline, tmp_path / "onnx")
    other = export(pipeline, tmp_path / "other")
    assert first.made_from["model"] == other.made_from["model"]
    assert first.made_from["pipeline"] != other.made_from["pipeline"]
    assert sha256_file(first.file("vae_decoder/model.onnx")) != sha256_file(
        other.file("vae_decoder/model.onnx")
    )


def test_a_pipeline_has_one_identity_in_sets_samples_and_bundles(pipeline: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 1, "steps": 2, "prompts": PROMPTS}
    made = collect(pipeline, tmp_path / "set", keep=2, **options)
    assert isinstance(made, store.CalibrationFolder)
    images = sample(pipeline, tmp_path / "images", **options)
    identity = pipeline_sha256(open_model(pipeline))
    assert made.made_from["pipeline"] == images.made_from["pipeline"] == identity
    change(next((pipeline / "vae").glob("*.safetensors")))
    assert pipeline_sha256(open_model(pipeline)) != identity


# A process that is killed as soon as the smoothing of its first stage is in the journal.
KILLED = """
import os, signal, sys
from qdeploy.store.builder import Draft
from tests.workflows.test_provenance import by_qncd

step = Draft.step_with_value

def killing(self, name, compute):
    made = step(self, name, compute)
    if name.endswith("-smoothing"):
        os.kill(os.getpid(), signal.SIGKILL)
    return made

Draft.step_with_value = killing
by_qncd(*sys.argv[1:])
"""


def by_qncd(model: str | Path, data: str | Path, output: str | Path) -> store.Checkpoint:
    return calibrate(
        model, output, recipe="w4a8-qncd", calibration=data, effort="fast,rows=8,batch=4,rounding=2,scales=2"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_calibration_ends_with_the_reports_of_one_that_was_not(ddpm: Path, tmp_path: Path) -> None:
    data = collect(ddpm, tmp_path / "set", samples=4, steps=4, keep=2).path
    whole = by_qncd(ddpm, data, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(ddpm), str(data), str(tmp_path / "stopped")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "stopped").exists()
    resumed = by_qncd(ddpm, data, tmp_path / "stopped")
    assert whole.stage_reports["smoothed_by_embedding"]["read_an_embedding"] > 0
    assert resumed.stage_reports == whole.stage_reports
    assert resumed.sha256 == whole.sha256
    took, kept = whole.measured.stage_seconds, resumed.measured.stage_seconds
    assert took is not None
    assert kept is not None
    assert took.keys() == kept.keys()


def test_sampling_from_an_engine_hashes_its_files_once(
    ddpm_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []

    def counted(path: Path, manifest: Any) -> Any:
        looked.append(path)
        return damage(path, manifest)

    monkeypatch.setattr(store, "damage", counted)
    sample(ddpm_engine.path, tmp_path / "images", samples=1, steps=2)
    assert looked == [ddpm_engine.path]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_engine_of_a_pipeline_knows_whose_text_encoder_it_came_with(
    pipeline: Path, tmp_path: Path
) -> None:
    bundle = export(pipeline, tmp_path / "onnx")
    assert bundle.made_from == {
        "model": open_model(pipeline).sha256,
        "pipeline": pipeline_sha256(open_model(pipeline)),
    }
    bare = export(pipeline, tmp_path / "bare", components=False)
    assert "pipeline" not in bare.made_from
    assert torch.equal(bundle.probe().reference, bare.probe().reference)
