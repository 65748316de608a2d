"""The shipped models through the real builder of TensorRT for RTX: every planned layer is low-bit in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rtx_builds import one_shape
from benchmarks.rtx_matrix import BATCH, FORMATS, MODELS, made, measured
from qdeploy.calibration_set.collect import collect

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx, which the extra dev installs")

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "rtx-builds.json"
# Layers that are low-bit in the plan; a format that is not here has all of its planned layers in int8.
LAYERS = {"digits": 81, "digits-dit": 30, "scenes": 75}
OTHERS = {
    ("digits", "fp8"): {"fp8": 81},
    ("digits-dit", "fp8"): {"fp8": 30},
    ("scenes", "fp8"): {"fp8": 75},
    ("digits", "NVFP4"): {"fp4": 24, "fp8": 57},
    ("digits-dit", "NVFP4"): {"fp4": 30},
    ("scenes", "NVFP4"): {"fp4": 40, "fp8": 35},
    ("digits", "int4 in blocks of 64"): {"int4": 24},
    ("digits-dit", "int4 in blocks of 64"): {"int4": 5},  # the others have 96 inputs
    ("scenes", "int4 in blocks of 64"): {"int4": 40},
}
CELLS = [(model, name) for model in MODELS for name in FORMATS]
SEVERAL = {("digits", "W4A8"), ("digits-dit", "NVFP4"), ("scenes", "W8A8, time table")}
TWICE = {("digits-dit", "fp8")}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows for each model: what is built does not depend on how good the ranges are."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: collect(name, folder / name, keep=5, samples=4, steps=10).path for name in MODELS}


def held(model: str, name: str, found: dict[str, Any]) -> None:
    """All of the planned layers are low-bit, for all GPUs that have the types, and write 16 bits."""
    assert found["kinds"] == OTHERS.get((model, name), {"int8": LAYERS[model]})
    assert found["as_planned"] == found["planned"] == sum(found["kinds"].values())
    assert found["float32_convolutions"] == 0
    newest = {"fp4": "sm120", "fp8": "sm89,sm120"}
    assert found["targets"] == next(
        (newest[kind] for kind in newest if kind in found["kinds"]), "sm86,sm89,sm120"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "name"), CELLS)
def test_every_planned_layer_is_low_bit_in_the_plan(
    model: str, name: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    graph = made(model, FORMATS[name], sets[model], tmp_path)
    builds = 2 if (model, name) in TWICE else 1
    found = measured(graph, one_shape(graph, BATCH), builds)
    held(model, name, found)
    assert found["differing_bytes"] in (None, 0)
    if (model, name) in SEVERAL:
        held(model, name, measured(graph, None, 1))


@pytest.mark.parametrize("shapes", ["one", "several"])
@pytest.mark.parametrize(("model", "name"), CELLS)
def test_the_results_hold_every_model_at_every_format(model: str, name: str, shapes: str) -> None:
    """Two builds of each for every GPU, by `benchmarks/rtx_matrix.py`."""
    rows = json.loads(RESULTS.read_text())["matrix"]
    (found,) = (r for r in rows if (r["model"], r["format"], r["shapes"]) == (model, name, shapes))
    held(model, name, found)
    assert found["same_layers"]
    if shapes == "one":
        assert found["differing_bytes"] == 0
