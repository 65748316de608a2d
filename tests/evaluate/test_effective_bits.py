"""The bits of a checkpoint are those that it multiplies with, whatever its name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qdeploy
from qdeploy.evaluate.effective_bits import Operation, effective_bits, operations, summary
from qdeploy.store.artifact import Artifact
from qdeploy.workflows.inspect import inspect
from tests.helpers import small_draft, some_facts


@pytest.fixture(scope="module")
def collected(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bits")
    return ddpm, qdeploy.collect(ddpm, folder / "set", samples=4, keep=4, steps=8)


def calibrated(collected: tuple[Path, Any], output: Path, **recipe: Any) -> Artifact:
    model, data = collected
    done = qdeploy.calibrate(model, output, calibration=data, effort="fast", **recipe)
    assert isinstance(done, Artifact)
    return done


def test_averages_are_weighted_by_multiplications() -> None:
    found = summary(
        [
            Operation("a", 300, 4, 8),
            Operation("b", 100, 32, 32),
            Operation("c", 0, 8, 8),
            Operation("qk", 100, None, 8),
        ]
    )
    assert found == {
        "weights": (300 * 4 + 100 * 32) / 400,
        "activations": (300 * 8 + 100 * 32 + 100 * 8) / 500,
        "float_mac_share": 0.2,
        "float": ["b"],
    }


def test_float_islands_count(collected: tuple[Path, Any], tmp_path: Path) -> None:
    """P27: W4A8 in name is more in fact, by what stayed in float."""
    checkpoint = calibrated(collected, tmp_path / "out", weights="int4")
    found = effective_bits(checkpoint)
    every = operations(checkpoint)
    assert found is not None
    assert every is not None
    assert {"conv_in", "conv_out", "mid_block.attentions.0"} <= set(found["float"])
    assert 4 < found["weights"] < 8
    assert 8 < found["activations"] < 12
    assert 0 < found["float_mac_share"] < 0.2
    by_path = {operation.path: operation for operation in every}
    assert (
        by_path["mid_block.resnets.0.conv1"].weights,
        by_path["mid_block.resnets.0.conv1"].activations,
    ) == (4, 8)
    assert by_path["mid_block.attentions.0"].macs == 2 * 16 * 16 * 16  # 16 pixels, 16 channels in all heads
    assert inspect(checkpoint.path)["effective_bits"] == found


def test_exclusion_and_coverage_show(collected: tuple[Path, Any], tmp_path: Path) -> None:
    everything = effective_bits(
        calibrated(
            collected, tmp_path / "all", weights="uint4", activations="uint8", coverage="qdiffusion-paper"
        )
    )
    assert everything == {"weights": 4.0, "activations": 8.0, "float_mac_share": 0.0, "float": []}
    weights_only = effective_bits(calibrated(collected, tmp_path / "w", weights="int4", activations="none"))
    assert weights_only is not None
    assert weights_only["activations"] == 32.0
    excluded = effective_bits(calibrated(collected, tmp_path / "less", exclude=("mid_block.*",)))
    assert excluded is not None
    assert "mid_block.resnets.0.conv1" in excluded["float"]


@pytest.mark.slow
def test_features_from_tables_multiply_nothing(collected: tuple[Path, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "cached.yaml"
    stages = ["weight-ranges", "activation-ranges", {"temporal-selection": {"mode": "cache"}}]
    recipe.write_text(json.dumps({"method": "tfmq", "coverage": "portable-time", "stages": stages}))
    found = operations(calibrated(collected, tmp_path / "out", recipe=recipe))
    assert found is not None
    assert all(op.macs == 0 for op in found if op.path.endswith("time_emb_proj"))


def test_a_checkpoint_that_does_not_tell_is_no_error(tmp_path: Path) -> None:
    """Versions that did not write multiplications down."""
    with small_draft(tmp_path / "other") as draft:
        draft.json("unet/layers.json", {"layers": [], "attentions": []})
        made = draft.finish(some_facts())
    assert effective_bits(made) is None
    assert "effective_bits" not in inspect(tmp_path / "other")
