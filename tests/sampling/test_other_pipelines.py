"""Engines of a ControlNet pipeline, an inpainting pipeline and one of two calls a step, in their stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.evaluate.check import check
from qdeploy.export.run import export
from qdeploy.model.folder import open_model
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import Artifact, EngineFolder
from qdeploy.system.machine import int8_sums_saturate
from qdeploy.workflows.calibrate import calibrate
from tests.models.catalogue import ENTRIES

KINDS = {
    "StableDiffusionControlNetPipeline": "a ControlNet's residuals",
    "StableDiffusionInpaintPipeline": "mask and masked image beside the sample",
    "WanPipeline": "guidance in two calls",
}
SAMPLED: dict[str, Any] = {"samples": 2, "steps": 4}


def built(name: str, folder: Path, calibrated: bool) -> tuple[Path, EngineFolder, dict[str, Any]]:
    """Model, engine and how to sample: W8A8, or full precision."""
    model = folder / "model"
    options = {**ENTRIES[name].write(model), "batch": 2}
    data = collect(model, folder / "set", samples=4, keep=3, steps=4, **options)
    source: Any = model
    if calibrated:
        asked: dict[str, Any] = {"recipe": "w8a8-minmax", "effort": "fast", "calibration": data}
        asked |= {"weights": "int7"} if int8_sums_saturate() else {}
        source = calibrate(model, folder / "w8a8", **asked)
    bundle = export(
        source, folder / "onnx", components=False, **({} if calibrated else {"calibration": data})
    )
    return model, build_engine(bundle, folder / "engine", backend="openvino", threads=1), options


def media(made: Artifact) -> torch.Tensor:
    return next(iter(load_file(next(made.path.glob("*.safetensors"))).values())).float()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_an_engine_samples_in_its_stock_pipeline_beside_full_precision(name: str, tmp_path: Path) -> None:
    model, engine, options = built(name, tmp_path, calibrated=True)
    told = check(engine, checkpoint=tmp_path / "w8a8", onnx=tmp_path / "onnx")
    assert told.passed, told.failures
    assert told.parity["sqnr_db"] >= 45
    own = sample(engine, tmp_path / "own", model=model, **SAMPLED, **options)
    full = sample(model, tmp_path / "full", **SAMPLED, **options)
    one, other = media(own), media(full)
    assert one.shape == other.shape
    assert (one - other).abs().mean() < 8  # of 255
    assert other.std() > 1


@pytest.mark.slow
def test_zeros_stand_for_no_controlnet(tmp_path: Path) -> None:
    model, engine, _ = built("StableDiffusionControlNetPipeline", tmp_path, calibrated=False)
    denoiser = open_model(model).load()
    drop_in = load_engine(engine).as_denoiser()
    assert "down_block_additional_residuals.0" in drop_in.engine.ports
    draw = torch.Generator().manual_seed(0)
    call = {
        "sample": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=draw),
    }
    with torch.no_grad():
        expected = denoiser(**call).sample
    assert torch.allclose(drop_in(**call).sample, expected, atol=1e-4)
    given = {
        name: torch.randn(2, *port.shape[1:], generator=draw)
        for name, port in drop_in.engine.ports.items()
        if "residual" in name
    }
    down = [value for name, value in given.items() if name.startswith("down")]  # as the pipeline gives them
    middle = given["mid_block_additional_residual"]
    hints = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    with torch.no_grad():
        hinted = denoiser(**call, **hints).sample
    assert torch.allclose(drop_in(**call, **hints).sample, hinted, atol=1e-4)
    assert not torch.allclose(hinted, expected, atol=1e-2)
