"""Calibrate on the CPU and on the pretend accelerator, in a process of its own; JSON of what came of it.

python -m tests.calibrate.device_run FOLDER RECIPE...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import pretend_accelerator as accelerator

accelerator.register()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qdeploy  # noqa: E402
from qdeploy.recipe.effort import EFFORTS  # noqa: E402
from tests.models import ddpm_folder  # noqa: E402


def main(folder: Path, recipes: list[str]) -> dict[str, Any]:
    """Largest relative difference of the probes' predictions, and copies by line, of each recipe."""
    torch.set_num_threads(1)
    EFFORTS["fast"] = replace(EFFORTS["fast"], rows=8, batch=4, rounding=3, scales=2, tuning=2)
    model = ddpm_folder(folder / "model")
    data = qdeploy.collect(model, folder / "set", samples=4, steps=4, inference_steps=8)
    found: dict[str, Any] = {}
    for recipe in recipes:
        outputs = []
        for device in ("cpu", accelerator.NAME):
            accelerator.to_host.clear()
            accelerator.to_device.clear()
            made = qdeploy.calibrate(
                model,
                folder / f"{recipe}-{device}",
                recipe=recipe,
                effort="fast",
                calibration=data,
                device=device,
            )
            outputs.append(load_file(made.path / "probe.safetensors")["simulated"])
        host, ours = outputs
        found[recipe] = {
            "difference": float((host - ours).norm() / host.norm()),
            "to_host": dict(accelerator.to_host),
            "to_device": dict(accelerator.to_device),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
