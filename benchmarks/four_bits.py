"""Presets of few bits side by side: SQNR of the simulation over several calibrations, with intervals.

    python -m benchmarks.four_bits --model digits-dit --output runs/four-bits
    python -m benchmarks.four_bits --model digits --recipes w4-blocks w4a8-svdquant benchmarks/claims/w4a8-*.yaml

Every recipe is calibrated on the same calibration set, once for each seed. SQNR is against full precision on held-out
rows of the sampling trajectory, median and worst; processor time is of the calibration. What is measured already is
not measured again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.four_bits_report import draw, table
from benchmarks.models import sampling
from qdeploy.calibration_set.collect import collect
from qdeploy.model.folder import read_json
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.store.files import write_json
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.machine import machine
from qdeploy.system.progress import say
from qdeploy.workflows.calibrate import calibrate

RECIPES = (
    *("w8a8-minmax", "w8a8-qdiffusion", "w8-weights"),
    *("w4a8-minmax", "w4a8-qdiffusion", "w4a8-qdiffusion-steady", "w4a8-svdquant"),
    *("w4-blocks", "w4-blocks-svdquant"),
    *("nvfp4-minmax", "nvfp4-svdquant", "w4a4-svdquant"),
)


def run(model: str, recipe: str, seed: int, effort: str, data: Path, folder: Path) -> dict[str, Any]:
    """Calibrate, and compare the simulation with full precision."""
    name, began = Path(recipe).stem, time.process_time()
    resolved = resolve_recipe(recipe)
    place = folder / f"{name}-{effort}-{seed}"
    checkpoint = calibrate(
        model, place, recipe=recipe, effort=effort, seed=seed, calibration=data, overwrite=True
    )
    took = time.process_time() - began
    _, reference, simulated = read_probe(checkpoint.path)
    assert simulated is not None
    rows = sqnr_by_row(simulated, reference)
    return {
        "model": model,
        "recipe": name,
        "precision": checkpoint.facts.precision,
        "calibrated": resolved.needs_rows,
        "effort": effort,
        "seed": seed,
        "sqnr_db": median(rows),
        "worst_db": min(rows),
        "cpu_s": took,
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits-dit", help="digits-dit, digits or scenes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="presets, or recipes' files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--output", type=Path, default=Path("runs/four-bits"))
    asked = parser.parse_args()
    folder = asked.output / asked.model
    folder.mkdir(parents=True, exist_ok=True)
    data, file = folder / "set", folder / "four-bits.json"
    collect(asked.model, data, samples=asked.samples, keep=8, **sampling(asked.model, 20, held_out=False))
    results: list[dict[str, Any]] = read_json(file)["results"] if file.exists() else []
    for seed in range(asked.seeds):
        for recipe in asked.recipes:
            if any((r["recipe"], r["seed"]) == (Path(recipe).stem, seed) for r in results):
                continue
            results.append(run(asked.model, recipe, seed, asked.effort, data, folder))
            write_json(file, {"machine": machine(), "results": results})
            say(f"{recipe}, seed {seed}: {results[-1]['sqnr_db']:.1f} dB")
    draw(results, folder / "four-bits.png")
    print(table(results).markdown())


if __name__ == "__main__":
    main()
