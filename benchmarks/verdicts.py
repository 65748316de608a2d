"""What each paper claims, with and without it, over several calibrations: the SQNR of one call.

    python -m benchmarks.verdicts --model digits --seeds 0 1 2 --output benchmarks/results/verdicts.json

`claims/` holds the recipes: each differs from the one that it is compared with in the one thing that a paper claims.
Calibrations are simulated and measured on calls of images that none has seen; differences are paired by calibration.
A row that the output holds already is not measured again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.roundings import figures, predictions
from benchmarks.verdicts_report import CLAIMS, table
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model, read_json
from qdeploy.model.sampling import COLLECTING
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.files import write_json
from qdeploy.system.machine import machine
from qdeploy.workflows.calibrate import calibrate

FOLDER = Path(__file__).parent / "claims"
NAMES = list(dict.fromkeys(name for claim in CLAIMS for name in (claim.without, claim.with_it)))


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=NAMES, help="names in claims/")
    parser.add_argument("--effort", default="fast,rounding=100,scales=30,rows=128")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verdicts.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_json(given.output)["results"] if given.output.exists() else []
    known = {(record["model"], record["recipe"], record["seed"], record["effort"]) for record in kept}
    sampling = replace(COLLECTING, steps=given.steps, scheduler="ddim", batch=32, seed=77_000)
    given.work.mkdir(parents=True, exist_ok=True)
    held = collect(given.model, given.work / f"{given.model}-held", sampling, keep=20, samples=16)
    unseen = CalibrationSet.open(held.path)
    timesteps = unseen.timesteps.flatten()
    reference = predictions(open_model(given.model).load().float().eval(), unseen)
    for seed in given.seeds:
        for name in given.recipes:
            if (given.model, name, seed, given.effort) in known:
                continue
            place = given.work / f"{given.model}-set-{seed}"
            data = collect(
                given.model, place, replace(sampling, seed=1000 * seed), keep=20, samples=given.images
            )
            recipe = resolve_recipe(FOLDER / f"{name}.yaml", effort=given.effort, seed=seed)
            began = time.process_time()
            made = calibrate(
                given.model, given.work / f"{given.model}-{name}-{seed}", recipe=recipe, calibration=data
            )
            took = round(time.process_time() - began)
            found = figures(reference, predictions(load_checkpoint(made).eval(), unseen), timesteps)
            kept.append(
                {
                    "model": given.model, "recipe": name, "seed": seed, "effort": given.effort, "cpu_seconds": took,
                    **{key: round(value, 2) for key, value in found.items()},
                }
            )  # fmt: skip
            print(kept[-1], flush=True)
            write_json(given.output, {"machine": machine(), "results": kept})
    print(table(kept).text())


if __name__ == "__main__":
    main()
