"""Calibration on another device than the CPU: the same result, and no tensors of two devices in one operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdeploy.recipe.resolve import presets, resolve_recipe

PARTS = 3


def run(folder: Path, *recipes: str) -> dict[str, Any]:
    """In a process of its own, since the pretend accelerator changes torch for good."""
    command = [sys.executable, "-m", "tests.calibrate.device_run", str(folder), *recipes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_tensors_of_two_devices_are_refused_as_on_a_gpu() -> None:
    program = (
        "from tests import pretend_accelerator as accelerator; accelerator.register(); import torch\n"
        "x = torch.ones(2, device='pretend')\n"
        "try: x + torch.ones(2)\n"
        "except RuntimeError as error: print(str(error).splitlines()[0])\n"
        "print((x + torch.tensor(1.0)).cpu().tolist(), (x * 3).device)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    refused, computed = done.stdout.splitlines()
    assert "Expected all tensors to be on the same device" in refused
    assert computed == "[2.0, 2.0] pretend:0"


def test_ranges_and_roundings_are_those_of_the_cpu(tmp_path: Path) -> None:
    assert run(tmp_path, "w8a8-minmax")["w8a8-minmax"]["difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.field) for part in range(1, PARTS))]
)
def test_presets_run_there_and_copy_nothing_while_they_learn(part: int, tmp_path: Path) -> None:
    names = list(presets())[part::PARTS]
    found = run(tmp_path, *names)
    assert list(found) == names
    for recipe, result in found.items():
        # Steps of learning and greedy choices amplify the last bits, and a search may take another of two ranges
        # that are as good; what comes of them is as good.
        bound = 0.2 if learns(recipe) else 0.05 if searches(recipe) else 1e-3
        assert result["difference"] < bound, recipe
        assert abs(result["sqnr_pretend"] - result["sqnr_cpu"]) < 1.5, recipe
        # Rounding in closed form decides a few things for each of the 50 layers, and nothing for each column.
        decisions = [n for place, n in result["to_host"].items() if place.startswith("calibrate/quadratic")]
        assert all(count < 4 * 50 for count in decisions), recipe
        for place in result["to_host"] | result["to_device"]:
            assert not place.startswith(
                ("calibrate/learning", "calibrate/rounding.py", "calibrate/tuning")
            ), place


def learns(recipe: str) -> bool:
    """Whether the result follows from steps of an optimiser or from choices between near alternatives."""
    learning = {"round-weights", "gptq", "scale-salient", "migrate-outliers", "low-rank", "smooth"}
    return any(stage.name in learning or "tune" in stage.name for stage in resolve_recipe(recipe).stages)


def searches(recipe: str) -> bool:
    """Whether ranges of activations are those with the least error."""
    return any(
        stage.name == "activation-ranges" and stage.options.get("finder") in ("lp", "mse")
        for stage in resolve_recipe(recipe).stages
    )


@pytest.mark.slow
def test_the_other_verbs_run_there_and_give_what_they_give_on_the_cpu(tmp_path: Path) -> None:
    found = run(tmp_path, "verbs")
    bounds = {"collect": 1e-5, "sample": 1e-3, "sensitivity": 0.02, "check": 1e-3}
    assert {verb: result["difference"] < bounds[verb] for verb, result in found.items()} == dict.fromkeys(
        bounds, True
    )
    # A call of the denoiser takes its inputs there and its prediction back, and nothing else.
    assert sum(found["collect"]["to_host"].values()) < 100
    assert all(result["to_device"] for result in found.values())
