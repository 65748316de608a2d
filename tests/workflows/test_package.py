"""Packages hold all that a server needs, and are refused in a sentence where they would not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.engines.build import build_engine
from qdeploy.store.artifact import Artifact, EngineFolder, open_artifact
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.workflows.packaging.layouts import LAYOUTS
from qdeploy.workflows.packaging.run import package


def test_triton_finds_the_pipeline_and_the_denoiser(
    qdeploy: Callable[..., Result], stable_diffusion_engine: EngineFolder, tmp_path: Path
) -> None:
    options = ("--for", "triton", "--name", "sd", "--batch", 8, "-o", tmp_path / "models")
    done = qdeploy("package", stable_diffusion_engine.path, *options, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == stable_diffusion_engine.sha256
    version = tmp_path / "models" / "pipeline" / "sd" / "1"
    assert open_artifact(version / "engine").sha256 == stable_diffusion_engine.sha256
    compile((version / "model.py").read_text(), "model.py", "exec")
    config = (version.parent / "config.pbtxt").read_text()
    assert 'backend: "python"' in config
    assert "max_batch_size: 8" in config
    assert 'name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] }' in config
    assert 'name: "GUIDANCE" data_type: TYPE_FP32 dims: [ 1 ] optional: true }' in config
    denoiser = tmp_path / "models" / "denoiser" / "sd"
    weights = stable_diffusion_engine.file("unet/openvino_model.bin").read_bytes()
    assert (denoiser / "1" / "model.bin").read_bytes() == weights
    assert 'backend: "openvino"' in (denoiser / "config.pbtxt").read_text()
    again = qdeploy("package", stable_diffusion_engine.path, *options)
    assert (again.exit_code, "pass --overwrite" in again.stderr) == (2, True)
    assert qdeploy("package", stable_diffusion_engine.path, *options, "--overwrite").exit_code == 0
    assert not list(tmp_path.glob(".*"))


def test_scripts_and_readmes_of_every_server_are_whole(
    stable_diffusion_engine: EngineFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineFolder, "find", lambda self, name: self.path / name)  # converted tokenizers
    for server in LAYOUTS:
        made = package(stable_diffusion_engine, tmp_path / server, server=server, name="sd")
        assert (made.path / "README.md").read_text().count("```console") == 1
        assert any(open_artifact(file.parent) for file in made.path.rglob("qdeploy.json"))
        for script in made.path.glob("*.py"):
            compile(script.read_text(), script.name, "exec")


def test_a_denoiser_alone_is_packaged_for_triton_only(
    stable_diffusion_bundle: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = build_engine(
        stable_diffusion_bundle, tmp_path / "alone", backend="onnxruntime", pipeline=False, threads=1
    )
    package(alone, tmp_path / "triton", server="triton")
    assert "denoiser alone" in capsys.readouterr().err
    assert (tmp_path / "triton" / "denoiser" / "alone" / "1" / "model.onnx").is_file()
    assert not (tmp_path / "triton" / "pipeline").exists()
    with pytest.raises(InvalidInputError, match="serves whole pipelines"):
        package(alone, tmp_path / "kserve", server="kserve")
    with pytest.raises(InvalidInputError, match="runs engines of openvino"):
        package(alone, tmp_path / "ovms", server="ovms")


def test_impossible_requests_are_refused(stable_diffusion_engine: EngineFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'triton'"):
        package(stable_diffusion_engine, tmp_path / "out", server="tritn")
    with pytest.raises(UsageError, match="name has letters"):
        package(stable_diffusion_engine, tmp_path / "out", server="triton", name="../up")
    with pytest.raises(UsageError, match="batch"):
        package(stable_diffusion_engine, tmp_path / "out", server="triton", batch=0)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="choose another output"):
        package(stable_diffusion_engine, tmp_path / "mine", server="triton", overwrite=True)
    if not stable_diffusion_engine.find("tokenizer/openvino_tokenizer.xml"):
        with pytest.raises(InvalidInputError, match="openvino-tokenizers"):
            package(stable_diffusion_engine, tmp_path / "out", server="openvino-genai")
    assert not (tmp_path / "out").exists()
