"""Presets of four bits on a transformer: SQNR of the simulation over several calibrations.

    python -m benchmarks.four_bits --model digits-dit --output runs/four-bits

Every preset is calibrated at effort ``fast`` on the same calibration set, once for each seed. SQNR is against full
precision on held-out rows of the sampling trajectory, median and worst; processor time is of the calibration. What is
there already is not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.models import sampling
from qdeploy.calibration_set.collect import collect
from qdeploy.store.files import write_json, write_text
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import sqnr_by_row
from qdeploy.system.machine import machine
from qdeploy.system.tables import Table
from qdeploy.workflows.calibrate import calibrate

PRESETS = (
    *("w4a8-minmax", "w4a8-qdiffusion", "w4a8-qdiffusion-steady", "w4a8-svdquant"),
    *("w4-blocks", "w4-blocks-svdquant", "w4a4-svdquant"),
)
COLUMNS = ("preset", "SQNR dB", "worst row dB", "CPU s")


def run(model: str, preset: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Calibrate, and compare the simulation with full precision."""
    began = time.process_time()
    checkpoint = calibrate(
        model, folder / f"{preset}-{seed}", recipe=preset, effort="fast", seed=seed, calibration=data
    )
    took = time.process_time() - began
    _, reference, simulated = read_probe(checkpoint.path)
    assert simulated is not None
    rows = sqnr_by_row(simulated, reference)
    return {
        "model": model,
        "preset": preset,
        "seed": seed,
        "sqnr_db": median(rows),
        "worst_db": min(rows),
        "cpu_s": took,
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Mean and deviation over the seeds of each preset."""
    rows = []
    for preset in dict.fromkeys(result["preset"] for result in results):
        own = [result for result in results if result["preset"] == preset]
        rows.append(
            [
                f"{preset} ({len(own)})",
                *(_spread([r[key] for r in own]) for key in ("sqnr_db", "worst_db", "cpu_s")),
            ]
        )
    return Table(COLUMNS, rows)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits-dit", help="digits-dit or scenes")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/four-bits"))
    asked = parser.parse_args()
    folder = asked.output / asked.model
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "set"
    collect(asked.model, data, samples=asked.samples, keep=8, **sampling(asked.model, 20, held_out=False))
    results: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        for preset in asked.presets:
            results.append(run(asked.model, preset, seed, data, folder))
            write_json(folder / "four-bits.json", {"machine": machine(), "results": results})
    write_text(folder / "four-bits.md", table(results).markdown())
    print(table(results).markdown())


if __name__ == "__main__":
    main()
