"""Calibration on another device than the CPU: the same result, and no tensors of two devices in one operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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
def test_every_method_runs_there_and_copies_nothing_while_it_learns(tmp_path: Path) -> None:
    learning = ("w4a8-qdiffusion-steady", "w4a8-tfmq", "w4a8-quest", "w8a8-qncd")
    found = run(tmp_path, *learning, "w4a8-dgq", "w8a8-smoothquant", "fp8-minmax")
    for recipe, result in found.items():
        # Steps of learning amplify the last bits.
        assert result["difference"] < (0.1 if recipe in learning else 1e-3), recipe
        for place in result["to_host"] | result["to_device"]:
            assert not place.startswith(
                ("calibrate/learning", "calibrate/rounding.py", "calibrate/tuning")
            ), place
