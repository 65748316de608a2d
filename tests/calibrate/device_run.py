"""Run verbs on the CPU and on the pretend accelerator, in a process of its own; JSON of what came of it.

python -m tests.calibrate.device_run FOLDER verbs|RECIPE...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import pretend_accelerator as accelerator

accelerator.register()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import qdeploy  # noqa: E402
from qdeploy.calibration_set.dataset import CalibrationSet  # noqa: E402
from qdeploy.evaluate.report_page.sensitivity import read_sensitivity  # noqa: E402
from qdeploy.mixed.ranking import LayerHarm  # noqa: E402
from qdeploy.recipe.effort import EFFORTS  # noqa: E402
from qdeploy.recipe.formats import parse_format  # noqa: E402
from qdeploy.recipe.resolve import resolve_recipe  # noqa: E402
from qdeploy.system.decibels import sqnr_db  # noqa: E402
from tests.models import ddpm_folder, dit_folder  # noqa: E402

SETTINGS: dict[str, Any] = {"samples": 4, "steps": 8, "keep": 4}


def on_both(run: Callable[[str], Tensor]) -> dict[str, Any]:
    """Largest relative difference of what comes of the two devices, and copies between them, by place."""
    host = run("cpu")
    accelerator.to_host.clear()
    accelerator.to_device.clear()
    ours = run(accelerator.NAME)
    return {
        "difference": float((host - ours).norm() / host.norm()),
        "to_host": dict(accelerator.to_host),
        "to_device": dict(accelerator.to_device),
    }


def recipes(folder: Path, names: list[str]) -> dict[str, Any]:
    """The predictions for the probe of each recipe's checkpoint; blocks and branches are those of a transformer."""
    models = {"unet": ddpm_folder(folder / "unet"), "dit": dit_folder(folder / "dit", head=64)}
    sets = {
        name: qdeploy.collect(model, folder / f"{name}-set", **SETTINGS) for name, model in models.items()
    }
    found = {}
    for name in names:
        recipe = resolve_recipe(name)
        format_of_weights = parse_format(recipe.weights)
        blocks = format_of_weights is not None and format_of_weights.block
        kind = "dit" if blocks or any(stage.name == "low-rank" for stage in recipe.stages) else "unet"

        groups = None if recipe.timestep_groups == 1 else 2  # there are four timesteps

        def run(device: str, name: str = name, kind: str = kind, groups: int | None = groups) -> Tensor:
            made = qdeploy.calibrate(
                models[kind], folder / f"{name}-{device}", recipe=name, effort="fast", calibration=sets[kind],
                device=device, timestep_groups=groups,
            )  # fmt: skip
            return load_file(made.path / "probe.safetensors")["simulated"]

        found[name] = on_both(run)
        for device in ("cpu", accelerator.NAME):
            probe = load_file(folder / f"{name}-{device}" / "probe.safetensors")
            found[name][f"sqnr_{device}"] = sqnr_db(probe["simulated"], probe["reference"])
    return found


def verbs(folder: Path) -> dict[str, Any]:
    """What the other verbs write."""
    model = ddpm_folder(folder / "model")
    data = qdeploy.collect(model, folder / "set", **SETTINGS)
    checkpoint = qdeploy.calibrate(model, folder / "checkpoint", recipe="w8a8-minmax", calibration=data)

    def collected(device: str) -> Tensor:
        made = qdeploy.collect(model, folder / f"collect-{device}", device=device, **SETTINGS)
        return CalibrationSet.open(made.path).inputs([0, 3, 9])["sample"]

    def sampled(device: str) -> Tensor:
        made = qdeploy.sample(checkpoint, folder / f"sample-{device}", samples=2, steps=4, device=device)
        return load_file(made.path / "images.safetensors")["images"].float()

    def measured(device: str) -> Tensor:
        made = qdeploy.sensitivity(
            model, folder / f"sensitivity-{device}", calibration=data, formats=["int8"], rows=4, probes=2,
            device=device,
        )  # fmt: skip
        return torch.tensor([sum(part.values()) for layer in by_name(made) for part in layer.best.values()])

    def by_name(made: qdeploy.Artifact) -> list[LayerHarm]:
        return sorted(read_sensitivity(made.path), key=lambda layer: layer.path)

    def checked(device: str) -> Tensor:
        result = qdeploy.check(checkpoint, reference=model, samples=2, steps=4, keep=4, device=device)
        return torch.tensor([result.quality["sqnr_db"]["median"]])

    ran = {"collect": collected, "sample": sampled, "sensitivity": measured, "check": checked}
    return {name: on_both(run) for name, run in ran.items()}


def main(folder: Path, wanted: list[str]) -> dict[str, Any]:
    """What is wanted, with as little work as there can be."""
    torch.set_num_threads(1)
    EFFORTS["fast"] = replace(EFFORTS["fast"], rows=8, batch=4, rounding=3, scales=2, tuning=2)
    return verbs(folder) if wanted == ["verbs"] else recipes(folder, wanted)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
