"""What deciding the roundings of weights costs and gives: nearest, GPTQ and AdaRound on one calibration set.

    python -m benchmarks.roundings --model digits --output runs/roundings

The same ranges for all (``lp``, W4A8); SQNR against full precision on calls of images that nothing was calibrated on:
median over timesteps, pooled, and the worst timestep; with the activations quantized, and with the weights alone.
Seconds are of the processor, for the whole calibration. ``table`` prints the kept results as Markdown:

    python -m benchmarks.roundings table benchmarks/results/roundings.json
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.roundings_report import FIGURES, table
from qdeploy.calibrate.methods.gptq import GPTQ
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model, read_json
from qdeploy.model.inputs import denoise
from qdeploy.model.sampling import COLLECTING
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.modes import weights_only
from qdeploy.recipe.stages import Stage
from qdeploy.store.files import write_json
from qdeploy.workflows.calibrate import calibrate

CLOSED = GPTQ(full_inputs=True, samples=64)
ROUNDINGS: dict[str, tuple[str, tuple[Stage, ...]]] = {
    "nearest": ("fast", ()),
    "GPTQ": ("fast", (GPTQ(),)),
    "GPTQ, full-precision inputs": ("fast", (GPTQ(full_inputs=True),)),
    "GPTQ, full-precision inputs, 64 vectors": ("fast", (CLOSED,)),
    "GPTQ, full-precision inputs, then learned": (
        "fast",
        (GPTQ(full_inputs=True), AdaRound(refine=True, lr=0.03)),
    ),
    "GPTQ, full-precision inputs, 64 vectors, then learned, early stop": (
        "fast",
        (CLOSED, AdaRound(refine=True, lr=0.03, settle=0.01)),
    ),
    "AdaRound, fast, early stop": ("fast", (AdaRound(settle=0.01),)),
    "AdaRound, fast": ("fast", (AdaRound(),)),
    "AdaRound, balanced": ("balanced", (AdaRound(),)),
}


def decibels(signal: float, noise: float) -> float:
    """Signal to noise, in dB; 200 at most."""
    return float(10 * torch.log10(torch.tensor(signal / max(noise, 1e-20 * signal))))


def figures(reference: Tensor, other: Tensor, timesteps: Tensor) -> dict[str, float]:
    """SQNR by timestep, summed up."""
    signal = reference.double().square().flatten(1).sum(1)
    noise = (other - reference).double().square().flatten(1).sum(1)
    each = [timesteps == t for t in timesteps.unique()]
    by_timestep = [decibels(float(signal[own].sum()), float(noise[own].sum())) for own in each]
    pooled = decibels(float(signal.sum()), float(noise.sum()))
    return dict(zip(FIGURES, (median(by_timestep), pooled, min(by_timestep)), strict=True))


def predictions(network: torch.nn.Module, data: CalibrationSet) -> Tensor:
    """The network's output for all rows."""
    with torch.no_grad():
        parts = torch.arange(len(data)).split(64)
        return torch.cat([denoise(network, data.inputs(part.tolist())) for part in parts])


def measure(
    model: str,
    output: Path,
    wanted: list[str],
    seed: int,
    held_images: int,
    images: int = 64,
    steps: int = 50,
) -> list[dict[str, Any]]:
    """One record for each way of rounding."""
    sampling = replace(COLLECTING, steps=steps, scheduler="ddim", batch=32, seed=1000 * seed)
    data = collect(model, output / f"{model}-set-{seed}", sampling, keep=20, samples=images)
    unseen_images = replace(sampling, seed=77_000)
    held = collect(model, output / f"{model}-held", unseen_images, keep=20, samples=held_images)
    unseen = CalibrationSet.open(held.path)
    timesteps = unseen.timesteps.flatten()
    reference = predictions(open_model(model).load().float().eval(), unseen)
    records = []
    for name in wanted:
        effort, rounding = ROUNDINGS[name]
        stages = [WeightRanges("lp"), *rounding, ActivationRanges("lp")]
        place = output / f"{model}-{name.replace(', ', '-').lower()}-{seed}"
        began = time.process_time()
        checkpoint = calibrate(
            model, place, weights="int4", activations="int8", effort=effort, stages=stages, calibration=data,
            seed=seed,
        )  # fmt: skip
        took = time.process_time() - began
        network = load_checkpoint(checkpoint).eval()
        record: dict[str, Any] = {
            "model": model,
            "rounding": name,
            "seed": seed,
            "cpu_seconds": round(took, 1),
        }
        modes: dict[str, AbstractContextManager[None]] = {
            "W4A8": nullcontext(),
            "weights alone": weights_only(network),
        }
        for kind, mode in modes.items():
            with mode:
                found = figures(reference, predictions(network, unseen), timesteps)
            record[kind] = {figure: round(value, 1) for figure, value in found.items()}
        records.append(record)
        print(record, flush=True)
    return records


def main() -> None:
    """Measure and write ``results.json``, or print what was kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kept", nargs="*", help="table FILE: print a file of results")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--output", type=Path, default=Path("runs/roundings"))
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=list(ROUNDINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-images", type=int, default=32)
    parser.add_argument("--images", type=int, default=64, help="that rows are collected from, 20 of each")
    parser.add_argument("--steps", type=int, default=50, help="of sampling, 20 or more")
    arguments = parser.parse_args()
    if arguments.kept:
        print(table(read_json(Path(arguments.kept[-1]))["results"]).markdown())
        return
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = measure(
        arguments.model, arguments.output, arguments.roundings, arguments.seed, arguments.held_images,
        arguments.images, arguments.steps,
    )  # fmt: skip
    write_json(arguments.output / "results.json", {"results": records})
    print(table(records).text())


if __name__ == "__main__":
    main()
