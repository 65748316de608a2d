"""Q-Diffusion here and by its authors' code: the same model, rows, layers and numbers of steps; one table.

    git clone https://github.com/Xiuyu-Li/q-diffusion
    python -m benchmarks.oracles.compare q-diffusion --model digits --output runs/oracles

SQNR against full precision on calls of images that nothing was calibrated on, of the weights alone too, with the
processor seconds of the calibration. For models that are called with a sample and a timestep alone.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.oracles.checkout import reference
from benchmarks.oracles.qdiffusion import Settings, quantize
from benchmarks.roundings import FIGURES, figures, predictions
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import COLLECTING
from qdeploy.network.roles import find_structure
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.modes import weights_only
from qdeploy.recipe.coverage import covered, find_coverage
from qdeploy.store.files import write_json
from qdeploy.system.tables import Table
from qdeploy.workflows.calibrate import calibrate

KINDS = ("full", "weights alone")


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for their code, one for ours."""
    settings = Settings(
        iterations=arguments.iterations, act_iterations=arguments.act_iterations, running=arguments.running
    )
    sampling = replace(
        COLLECTING, steps=arguments.steps, scheduler="ddim", batch=32, seed=1000 * arguments.seed
    )
    output: Path = arguments.output
    rows = {"keep": arguments.keep, "samples": arguments.images}
    data = CalibrationSet.open(
        collect(arguments.model, output / f"set-{arguments.seed}", sampling, **rows).path
    )
    held = {"keep": arguments.keep, "samples": arguments.held_images}
    unseen = CalibrationSet.open(
        collect(arguments.model, output / "held", replace(sampling, seed=77_000), **held).path
    )
    timesteps = unseen.timesteps.flatten()
    model = open_model(arguments.model)
    expected = predictions(model.load().float().eval(), unseen)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed))
    chosen = chosen[: arguments.rows]

    def record(code: str, seconds: float, found: dict[str, torch.Tensor]) -> dict[str, Any]:
        made: dict[str, Any] = {"model": arguments.model, "code": code, "seed": arguments.seed}
        made["cpu_seconds"] = round(seconds, 1)
        for kind, prediction in found.items():
            made[kind] = {
                figure: round(value, 1) for figure, value in figures(expected, prediction, timesteps).items()
            }
        print(made, flush=True)
        return made

    denoiser = model.load().float().eval()
    inputs = data.inputs(chosen.tolist())
    layers = covered(find_structure(denoiser, data.inputs([0])), find_coverage(arguments.coverage))
    began = time.process_time()
    with reference(arguments.checkout, arguments.package) as qdiff:
        switched = quantize(
            denoiser, layers, inputs["sample"], inputs["timestep"], qdiff, settings, arguments.seed
        )
        took = time.process_time() - began
        theirs = {kind: predictions(switched(kind == "full"), unseen) for kind in KINDS}
    records = [record("the authors'", took, theirs)]
    began = time.process_time()
    checkpoint = calibrate(
        arguments.model, output / f"ours-{arguments.seed}", method="qdiffusion", weights="uint4",
        activations="uint8", target="openvino", coverage=arguments.coverage, calibration=data.path,
        seed=arguments.seed, overwrite=True,
        effort=f"fast,rows={arguments.rows},batch={settings.batch},rounding={settings.iterations},"
        f"scales={max(1, settings.act_iterations)}",
    )  # fmt: skip
    took = time.process_time() - began
    network = load_checkpoint(checkpoint).eval()
    ours = {}
    for kind in KINDS:
        with nullcontext() if kind == "full" else weights_only(network):
            ours[kind] = predictions(network, unseen)
    return [*records, record("qdeploy", took, ours)]


def table(records: list[dict[str, Any]]) -> Table:
    """The records side by side."""
    columns = ["model", "code", "CPU s", "W4A8: median / pooled / worst dB", "weights alone"]
    rows = [
        [
            record["model"],
            record["code"],
            f"{record['cpu_seconds']:.0f}",
            *(" / ".join(f"{record[kind][figure]:.1f}" for figure in FIGURES) for kind in KINDS),
        ]
        for record in records
    ]
    return Table(columns, rows)


def main() -> None:
    """Measure, write ``results.json`` and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of the authors' repository")
    parser.add_argument("--package", default="qdiff")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--coverage", default="portable")
    parser.add_argument("--output", type=Path, default=Path("runs/oracles"))
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (
        ("rows", 256), ("images", 64), ("held-images", 32), ("steps", 50), ("keep", 20), ("iterations", 300),
        ("act-iterations", 60),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--running", action="store_true", help="their --running_stat")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = compare(arguments)
    write_json(arguments.output / "results.json", {"results": records})
    print(table(records).text())


if __name__ == "__main__":
    main()
