"""Folders as they are published, in 16 bits, go the whole way: every component in float32 whatever is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.evaluate.check import check
from qdeploy.export.run import export
from qdeploy.sampling.sample import sample
from qdeploy.store.artifact import CalibrationFolder, Checkpoint
from qdeploy.workflows.calibrate import calibrate
from tests.models import flux_folder, pixart_folder, sd3_folder, sdxl_folder, stable_diffusion_folder

PROMPTS = ["a cat", "two dogs"]
MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "sd15": (stable_diffusion_folder, {}),
    "sdxl": (sdxl_folder, {}),
    "sd3": (sd3_folder, {"height": 16, "width": 16}),
    "flux": (flux_folder, {"height": 16, "width": 16}),
    "pixart": (pixart_folder, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_half_precision_folder_goes_from_collect_to_check(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, size = MODELS[name]
    pipeline = DiffusionPipeline.from_pretrained(make(tmp_path / "source"), torch_dtype=dtype)
    pipeline.save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    data = collect(model, tmp_path / "set", samples=4, keep=2, steps=3, prompts=PROMPTS, guidance=3.0, **size)
    assert isinstance(data, CalibrationFolder)
    checkpoint = calibrate(
        model, tmp_path / "w8a8", recipe="w8a8-minmax", effort="fast", calibration=data.path
    )
    assert isinstance(checkpoint, Checkpoint)
    bundle = export(checkpoint, tmp_path / "onnx", components=False)
    engine = build_engine(bundle, tmp_path / "engine", backend="openvino", threads=1)
    made = sample(engine, tmp_path / "images", samples=1, steps=3, prompts=PROMPTS)
    assert (made.path / "00000.png").is_file()
    result = check(engine, reference=model, samples=2, keep=2, steps=3, prompts=PROMPTS, min_sqnr=10.0)
    assert result.passed, result.failures
