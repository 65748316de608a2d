"""Ours against the authors' own code: the same model, calibration rows, layers, bits and steps.

    pip install einops
    git clone https://github.com/Xiuyu-Li/q-diffusion
    python -m benchmarks.oracles.run qdiffusion --checkout q-diffusion --seeds 0 1 2

Both see the same rows and are measured on the same calls of images that neither has seen: SQNR against full
precision, median over timesteps, pooled, and of the worst timestep. Seconds are of the processor, one thread.
Results are added to ``--output``. What the authors' code saves is imported as a checkpoint of ours, and has to
compute the same: its SQNR against the authors' network is kept, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracles import qdiffusion, tfmq
from benchmarks.oracles.authors import Network, Quantized
from benchmarks.oracles.budget import Budget
from benchmarks.oracles.report import table
from benchmarks.roundings import figures, predictions
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model, read_json
from qdeploy.model.sampling import COLLECTING
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import weights_only
from qdeploy.store.files import write_json
from qdeploy.system.machine import machine
from qdeploy.system.memory import peak_memory
from qdeploy.workflows.calibrate import calibrate
from qdeploy.workflows.import_checkpoint import import_checkpoint

AUTHORS: dict[str, Callable[..., Quantized]] = {
    "qdiffusion": qdiffusion.quantize,
    "tfmq": tfmq.quantize,
}
MODEL = "digits"  # of the class of networks that the authors' scripts for CIFAR-10 take


def rows_of(data: CalibrationSet) -> tuple[Tensor, Tensor]:
    """Inputs [N, C, H, W] and timesteps [N] of a set, those of a timestep together, the noisiest first."""
    inputs = data.inputs(list(range(len(data))))
    t = data.timesteps.flatten().float()
    order = torch.argsort(t, descending=True, stable=True)
    return inputs["sample"][order], t[order]


def outputs(network: Network, x: Tensor, t: Tensor) -> Tensor:
    """Predictions for all rows."""
    with torch.no_grad():
        return torch.cat([network(x[part], t[part]) for part in torch.arange(len(x)).split(64)])


def measured(output: Tensor, t: Tensor, reference: Tensor) -> dict[str, float]:
    """Figures of predictions for held-out rows."""
    return {key: round(value, 1) for key, value in figures(reference, output, t).items()}


def imported(saved: Mapping[str, Any], method: str, timesteps: list[float], place: Path) -> Network:
    """The checkpoint that `qdeploy import-checkpoint` makes of what the authors' code saves."""
    file = place.with_suffix(".pth")
    torch.save(saved, file)
    made = import_checkpoint(file, MODEL, place, method=method, timesteps=timesteps, overwrite=True)
    return _as_function(load_checkpoint(made).eval())


def main() -> None:
    """Measure what is asked, write it, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=[*AUTHORS, "table"])
    parser.add_argument("--checkout", type=Path, help="folder of the authors' repository")
    parser.add_argument("--bits", default="w4a8", choices=["w4a8", "w8a8"])
    parser.add_argument("--coverage", default="portable", help="of ours; `paper` is the authors' own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--rounding", type=int, default=500, help="steps for each unit's roundings; 0: to nearest"
    )
    parser.add_argument("--scales", type=int, default=100, help="steps for each unit's activation scales")
    parser.add_argument("--images", type=int, default=32, help="calibration images, 20 calls of each")
    parser.add_argument("--held-images", type=int, default=32)
    parser.add_argument("--groups", type=int, default=1, help="of timesteps, in ours")
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--recipe", help="of ours, beside the method's own preset")
    parser.add_argument("--work", type=Path, default=Path("runs/oracles"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/oracles.json"))
    given = parser.parse_args()
    kept = read_json(given.output)["results"] if given.output.exists() else []
    if given.method == "table":
        print(table(kept).markdown())
        return
    torch.set_num_threads(1)
    for seed in given.seeds:
        for who in ("ours", "theirs"):
            if given.only in (None, who) and (record := measure(who, seed, given)) is not None:
                kept.append(record)
                print(record, flush=True)
                write_json(given.output, {"machine": machine(), "results": kept})
    print(table(kept).text())


def measure(who: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One calibration by one side."""
    given.work.mkdir(parents=True, exist_ok=True)
    sampling = replace(COLLECTING, steps=50, scheduler="ddim", batch=32, seed=1000 * seed)
    data = collect(MODEL, given.work / f"set-{seed}-{given.images}", sampling, keep=20, samples=given.images)
    unseen = collect(
        MODEL, given.work / f"held-{given.held_images}", replace(sampling, seed=77_000), keep=20,
        samples=given.held_images,
    )  # fmt: skip
    model = open_model(MODEL).load().float().eval()
    held = CalibrationSet.open(unseen.path)
    reference = predictions(model, held)
    held_x, held_t = rows_of(held)
    order = torch.argsort(held.timesteps.flatten().float(), descending=True, stable=True)
    reference = reference[order]
    weight_bits, activation_bits = int(given.bits[1]), int(given.bits[3])
    coverage = f"{given.method}-paper" if given.coverage == "paper" else given.coverage
    ours = given.work / f"ours-{given.method}-{given.bits}-{coverage}-{seed}-{given.rounding}-{given.groups}"
    effort = f"fast,rows={20 * given.images},batch=32"
    if given.rounding:
        effort += f",rounding={given.rounding},scales={given.scales}"
    began = time.process_time()
    checkpoint = calibrate(
        MODEL, ours, recipe=given.recipe, method=None if given.recipe else given.method,
        weights=f"uint{weight_bits}", activations=f"uint{activation_bits}", coverage=coverage, target="simulated",
        calibration=data, seed=seed, effort=effort,
        timestep_groups=given.groups,
    )  # fmt: skip
    seconds = time.process_time() - began
    quantized = load_checkpoint(checkpoint).eval()
    record: dict[str, Any] = {
        "method": given.method,
        "bits": given.bits,
        "coverage": given.coverage,
        "seed": seed,
        "who": who,
        "steps": [given.rounding, given.scales],
    }
    if who == "ours":
        record |= {"recipe": given.recipe or given.method, "groups": given.groups}
        network = _as_function(quantized)
        with weights_only(quantized):
            record["weights alone"] = measured(outputs(network, held_x, held_t), held_t, reference)
    else:
        torch.manual_seed(seed)
        layers = {name for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLayer)}
        x, t = rows_of(CalibrationSet.open(data.path))
        budget = Budget(weight_bits, activation_bits, given.rounding, given.scales)
        began = time.process_time()
        paper = given.coverage == "paper"
        made = AUTHORS[given.method](given.checkout, model, x, t, budget, None if paper else layers)
        seconds = time.process_time() - began
        network = made.network
        place = given.work / f"theirs-{given.method}-{given.bits}-{coverage}-{seed}"
        descending = t.unique().flip(0).tolist()
        again = outputs(imported(made.saved, given.method, descending, place), held_x, held_t)
        record["imported"] = measured(again, held_t, outputs(network, held_x, held_t))
    record[given.bits] = measured(outputs(network, held_x, held_t), held_t, reference)
    return record | {"cpu_seconds": round(seconds), "peak_gb": round((peak_memory() or 0) / 1e9, 2)}


def _as_function(network: nn.Module) -> Network:
    return lambda x, t: network(sample=x, timestep=t).sample  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
