"""The benchmark's own code on engines of this machine; what it measures with TensorRT needs a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMPipeline

from qdeploy.engines.build import build_engine
from qdeploy.engines.tensorrt import smi
from qdeploy.store.artifact import Artifact, open_artifact
from tests.engines.tensorrt.stand_in import ROOT

STATE = {"sm_mhz": 1980.0, "used_mib": 1024.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sampling", ROOT / "benchmarks" / "tensorrt_sampling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(smi, "gpu_state", lambda: STATE)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    return module


def test_steps_and_pipelines_make_one_table(
    script: ModuleType, quantized_bundle: Artifact, float_bundle: Artifact, ddpm: Path, tmp_path: Path
) -> None:
    engines = {
        name: open_artifact(build_engine(bundle, tmp_path / name, backend="openvino", threads=1).path)
        for name, bundle in (("fp16", float_bundle), ("int8", quantized_bundle))
    }
    rows = script.steps(engines, (1, 2), 3, 0.1)
    assert [(row["engine"], row["batch"]) for row in rows] == [
        ("fp16", 1), ("int8", 1), ("fp16", 2), ("int8", 2),
    ]  # fmt: skip
    assert all(row["ms"]["p95"] >= row["ms"]["median"] > 0 for row in rows)
    assert [row["int8_mac_share"] > 0 for row in rows] == [False, True, False, True]
    pipelines = [
        {"engine": row["engine"]}
        | script.whole(lambda: DDPMPipeline.from_pretrained(ddpm), 3, row["batch"], 2, None)
        for row in rows
    ]
    assert all(found["images"] == 3 and found["torch_peak_mib"] == 3 for found in pipelines)
    assert all(
        found["images_per_second"] == pytest.approx(3 / found["seconds"], rel=0.05) for found in pipelines
    )
    lines = script.table({"steps": rows, "pipelines": pipelines}).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "1.00x" in lines[2]
    assert "1980" in lines[2]
