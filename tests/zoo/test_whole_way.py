"""Every model of the zoo that is told what to show goes the whole way, with guidance, to an engine that passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.check import check
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.model.zoo import zoo_models
from qdeploy.sampling.media_files import file_of
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact
from qdeploy.workflows.calibrate import calibrate

PROMPTS = {
    "digits-dit": ("0", "3", "8"),
    "scenes": ("a large red circle on a white background", "two small blue stars on a black background"),
}
SHAPES = {"digits-dit": [3, 1, 16, 16], "scenes": [3, 3, 64, 64]}


def test_all_models_are_listed() -> None:
    assert zoo_models() == ["digits", "digits-dit", "scenes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-dit", "scenes"])
def test_from_the_model_to_a_checked_engine(name: str, tmp_path: Path) -> None:
    prompts = PROMPTS[name]
    data = collect(name, tmp_path / "set", samples=6, keep=4, steps=6, prompts=prompts, guidance=3.0, batch=6)
    checkpoint = calibrate(name, tmp_path / "w8a8", recipe="w8a8-minmax", effort="fast", calibration=data)
    assert isinstance(checkpoint, Artifact)
    bundle = export(checkpoint, tmp_path / "onnx")
    engine = build_engine(bundle, tmp_path / "engine", backend="openvino", threads=1)
    made = sample(engine, tmp_path / "images", samples=3, steps=4, prompts=prompts, guidance=3.0)
    assert list(load_file(made.path / file_of("images"))["images"].shape) == SHAPES[name]
    result = check(
        engine,
        reference=open_model(name),
        samples=2,
        keep=2,
        steps=4,
        prompts=prompts,
        guidance=3.0,
    )
    assert result.passed, result.to_json()
    # Both halves of the guided batch are compared, the one with and the one without a prompt.
    assert result.quality["sqnr_db"]["worst"] > 10
