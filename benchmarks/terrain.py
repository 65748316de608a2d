"""What presets make of a trained network whose activations have outliers: the model of `benchmarks.terrain_model`.

    python -m benchmarks.terrain --folder runs/terrain

SQNR against full precision on seeds that nothing was calibrated on, by timestep: of the simulation, of its weights
alone, and of OpenVINO's engine, with the share of the multiplications that ran in int8. ``--why`` measures in
addition what the activations are like and what each quantizer costs alone. All in ``results.json`` of the folder; a
preset that is in it already is not measured again.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.terrain_model import terrain_folder
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.engines.base import Engine
from qdeploy.engines.build import build_engine, load_engine
from qdeploy.engines.measure import row_by_row, single_rows
from qdeploy.export.run import export
from qdeploy.model.folder import open_model, read_json
from qdeploy.model.inputs import denoise
from qdeploy.model.sampling import COLLECTING
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.modes import weights_only
from qdeploy.store.artifact import CalibrationFolder, Checkpoint
from qdeploy.store.files import write_json
from qdeploy.system.decibels import sqnr_db
from qdeploy.system.machine import machine
from qdeploy.workflows.calibrate import calibrate

STEPS = 2  # of sampling: the network is called at t = 1096 and 202
# Each with a coverage of its own, where it is not that of the recipe.
PRESETS = (
    "w8a8-minmax-cpu",
    "w8a8-smoothquant-outliers",
    "w8a8-smoothquant-outliers portable-attention",
    "w4a8-gptq",
    "w4a8-gptq-outliers",
)
SIMULATED = ("w8a8-minmax-cpu", "w4a8-gptq")  # no engine is built of these: they are there to compare with


def calls_of(model: Path, folder: Path, images: int, seed: int) -> CalibrationFolder:
    """Calls of the network while images of some seeds are sampled."""
    sampling = replace(COLLECTING, steps=STEPS, batch=1, seed=seed)
    return collect(model, folder / f"set-{seed}-{images}", sampling, keep=STEPS, samples=images)


def predictions(network: torch.nn.Module, data: CalibrationSet) -> Tensor:
    """The network's output for all rows, one after the other."""
    with torch.no_grad():
        return torch.cat([denoise(network, data.inputs([row])) for row in range(len(data))])


def by_timestep(reference: Tensor, other: Tensor, timesteps: Tensor) -> dict[str, float]:
    """SQNR in dB at each timestep, pooled over rows."""
    return {
        str(round(float(timestep))): round(
            sqnr_db(other[timesteps == timestep], reference[timesteps == timestep]), 1
        )
        for timestep in timesteps.unique()
    }


def measure(folder: Path, presets: list[str], images: int = 6, engines: bool = False) -> list[dict[str, Any]]:
    """One record for each preset: SQNR by timestep, of the weights alone and of engines too; processor seconds."""
    model = terrain_folder(folder)
    data, unseen = (
        calls_of(model, folder, images, 0),
        CalibrationSet.open(calls_of(model, folder, 2, 900).path),
    )
    timesteps = unseen.timesteps.flatten()
    reference = predictions(open_model(model).load().float().eval(), unseen)
    records = []
    for asked in presets:
        preset, _, coverage = asked.partition(" ")
        began = time.process_time()
        checkpoint = calibrate(
            model, folder / f"checkpoint-{asked.replace(' ', '-')}", recipe=preset, effort="fast", calibration=data,
            coverage=coverage or None, overwrite=True,
        )  # fmt: skip
        took = time.process_time() - began
        network = load_checkpoint(checkpoint).eval()
        record: dict[str, Any] = {"preset": asked, "cpu_seconds": round(took, 1)}
        for kind, mode in (("quantized", nullcontext()), ("weights alone", weights_only(network))):
            with mode:
                record[kind] = by_timestep(reference, predictions(network, unseen), timesteps)
        if engines and asked not in SIMULATED:
            record |= engine_of(checkpoint, folder, reference, unseen)
        records.append(record)
        print(record, flush=True)
    return records


def engine_of(
    checkpoint: Checkpoint, folder: Path, reference: Tensor, unseen: CalibrationSet
) -> dict[str, Any]:
    """OpenVINO's engine of a checkpoint: SQNR by timestep, int8's share of the multiplications, and its costs."""
    began = time.process_time()
    bundle = export(
        checkpoint,
        folder / f"{checkpoint.path.name}-onnx",
        components=False,
        overwrite=True,
        target="openvino",
    )
    exported = time.process_time() - began
    engine = build_engine(
        bundle, folder / f"{checkpoint.path.name}-engine", backend="openvino", precision="f32", threads=1,
        pipeline=False, overwrite=True,
    )  # fmt: skip
    with load_engine(engine, threads=1) as loaded:
        rows = unseen.inputs(list(range(len(unseen))))
        found = by_timestep(reference, row_by_row(loaded, rows), unseen.timesteps.flatten())
        took = [cpu_ms(loaded, row) for row in single_rows(rows) for _ in range(5)]
    measured = engine.measured
    return {
        "engine": found,
        "int8_mac_share": measured.int8_mac_share,
        "export_cpu_seconds": round(exported, 1),
        "engine_cpu_ms": round(median(took), 1),
        "engine_mb": measured.size_mb,
    }


def cpu_ms(engine: Engine, row: dict[str, Tensor]) -> float:
    """Processor time of a call in milliseconds: other work on the machine touches it less."""
    began = time.process_time()
    engine(row)
    return 1e3 * (time.process_time() - began)


def main() -> None:
    """Measure and write ``results.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/terrain"))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--why", action="store_true", help="measure each quantizer alone, too: minutes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    file = asked.folder / "results.json"
    kept: dict[str, Any] = read_json(file) if file.is_file() else {"results": []}
    kept["machine"] = machine()
    for preset in asked.presets:
        if all(record["preset"] != preset for record in kept["results"]):
            kept["results"] += measure(asked.folder, [preset], engines=True)
            write_json(file, kept)
    if asked.why:
        from benchmarks.terrain_why import causes

        kept["why"] = causes(asked.folder)
        write_json(file, kept)


if __name__ == "__main__":
    main()
