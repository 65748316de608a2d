"""What presets make of a trained network whose activations have outliers: the model of `benchmarks.terrain_model`.

    python -m benchmarks.terrain --folder runs/terrain

SQNR against full precision on seeds that nothing was calibrated on, by timestep; in ``results.json``.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.terrain_model import terrain_folder
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import denoise
from qdeploy.model.sampling import COLLECTING
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.modes import weights_only
from qdeploy.store.artifact import CalibrationFolder
from qdeploy.store.files import write_json
from qdeploy.system.decibels import sqnr_db
from qdeploy.workflows.calibrate import calibrate

STEPS = 2  # of sampling: the network is called at t = 1095 and 202
PRESETS = ("w8a8-minmax-cpu", "w8a8-smoothquant-outliers", "w4a8-gptq")


def calls_of(model: Path, folder: Path, images: int, seed: int) -> CalibrationFolder:
    """Calls of the network while images of some seeds are sampled."""
    sampling = replace(COLLECTING, steps=STEPS, batch=1, seed=seed)
    return collect(model, folder / f"set-{seed}-{images}", sampling, keep=STEPS, samples=images)


def predictions(network: torch.nn.Module, data: CalibrationSet) -> Tensor:
    """The network's output for all rows, one after the other."""
    with torch.no_grad():
        return torch.cat([denoise(network, data.inputs([row])) for row in range(len(data))])


def by_timestep(reference: Tensor, other: Tensor, timesteps: Tensor) -> dict[int, float]:
    """SQNR in dB at each timestep, pooled over rows."""
    return {
        round(float(timestep)): sqnr_db(other[timesteps == timestep], reference[timesteps == timestep])
        for timestep in timesteps.unique()
    }


def measure(folder: Path, presets: list[str], images: int = 6) -> list[dict[str, Any]]:
    """One record for each preset: SQNR by timestep, of the weights alone too, and processor seconds."""
    model = terrain_folder(folder)
    data, unseen = (
        calls_of(model, folder, images, 0),
        CalibrationSet.open(calls_of(model, folder, 2, 900).path),
    )
    timesteps = unseen.timesteps.flatten()
    reference = predictions(open_model(model).load().float().eval(), unseen)
    records = []
    for preset in presets:
        began = time.process_time()
        checkpoint = calibrate(
            model, folder / f"checkpoint-{preset}", recipe=preset, effort="fast", calibration=data,
            overwrite=True,
        )  # fmt: skip
        took = time.process_time() - began
        network = load_checkpoint(checkpoint).eval()
        record: dict[str, Any] = {"preset": preset, "cpu_seconds": round(took, 1)}
        for kind, mode in (("quantized", nullcontext()), ("weights alone", weights_only(network))):
            with mode:
                found = by_timestep(reference, predictions(network, unseen), timesteps)
            record[kind] = {str(timestep): round(value, 1) for timestep, value in found.items()}
        records.append(record)
        print(record, flush=True)
    return records


def main() -> None:
    """Measure and write ``results.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/terrain"))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_json(arguments.folder / "results.json", {"results": measure(arguments.folder, arguments.presets)})


if __name__ == "__main__":
    main()
