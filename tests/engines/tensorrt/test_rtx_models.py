"""The shipped models through the real builder of TensorRT for RTX: every planned layer is low-bit in the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdeploy.calibration_set.collect import collect
from qdeploy.engines.build import build_engine
from qdeploy.export.run import export
from qdeploy.workflows.calibrate import calibrate

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx, which the extra dev installs")

CASES = {
    "digits, W8A8": ("digits", {"weights": "int8", "activations": "int8"}, "sm86,sm89,sm120", {"int8": 81}),
    "digits, W4A8": ("digits", {"weights": "int4", "activations": "int8"}, "sm86,sm89,sm120", {"int8": 81}),
    "digits, fp8": ("digits", {"weights": "fp8", "activations": "fp8"}, "sm89,sm120", {"fp8": 81}),
    "digits, scales by timestep": (
        "digits",
        {"weights": "int8", "activations": "int8", "timestep_groups": "2"},
        "sm86,sm89,sm120",
        {"int8": 81},
    ),
    "transformer, W8A8": (
        "digits-dit",
        {"weights": "int8", "activations": "int8"},
        "sm86,sm89,sm120",
        {"int8": 30},
    ),
    "transformer, fp8": ("digits-dit", {"weights": "fp8", "activations": "fp8"}, "sm89,sm120", {"fp8": 30}),
    "digits, table of timesteps": (
        "digits",
        {"weights": "int8", "activations": "int8", "time_table": "fp32"},
        "sm86,sm89,sm120",
        {"int8": 81},
    ),
    "scenes, W8A8": ("scenes", {"weights": "int8", "activations": "int8"}, "sm86,sm89,sm120", {"int8": 75}),
    "scenes, fp8": ("scenes", {"weights": "fp8", "activations": "fp8"}, "sm89,sm120", {"fp8": 75}),
    "transformer, W4A8": (
        "digits-dit",
        {"weights": "int4", "activations": "int8"},
        "sm86,sm89,sm120",
        {"int8": 30},
    ),
    "digits, NVFP4 beside fp8": ("digits", {"recipe": "nvfp4-minmax"}, "sm120", {"fp4": 24, "fp8": 57}),
    "transformer, NVFP4": ("digits-dit", {"recipe": "nvfp4-minmax"}, "sm120", {"fp4": 30}),
    "transformer, int4 blocks": (
        "digits-dit",
        {"weights": "int4b128", "activations": "none"},
        "sm86,sm89,sm120",
        {"int4": 5},
    ),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows for each model: what is built does not depend on how good the ranges are."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: collect(name, folder / name, keep=5, samples=4, steps=10).path
        for name in ("digits", "digits-dit", "scenes")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_every_planned_layer_is_low_bit_in_the_plan(case: str, sets: dict[str, Path], tmp_path: Path) -> None:
    model, options, gpu, kinds = CASES[case]
    formats = {name: value for name, value in options.items() if name != "time_table"}
    checkpoint = calibrate(
        model, tmp_path / "checkpoint", calibration=sets[model], method="minmax", target="tensorrt", **formats
    )
    table = options.get("time_table", "none")
    bundle = export(checkpoint, tmp_path / "onnx", components=False, time_table=table)
    engine = build_engine(bundle, tmp_path / "engine", backend="tensorrt-rtx", gpu=gpu)
    found = json.loads(next(engine.path.glob("*/layers.json")).read_text())
    report = found["report"]
    assert report["kinds"] == kinds
    assert report["as_planned"] == report["planned"] == sum(kinds.values())
    convolutions = [layer for layer in found["layers"] if layer["LayerType"] == "correlation"]
    wide = {
        name for name in report["float32_results"] if any(name in layer["Name"] for layer in convolutions)
    }
    assert wide == set()
    plan = json.loads(next(engine.path.glob("*/plan.json")).read_text())
    assert plan["targets"] == [int(sm.removeprefix("sm")) for sm in gpu.split(",")]
