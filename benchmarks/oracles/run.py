"""Ours against the authors' own code: the same model, calibration rows, layers, bits and steps.

    pip install einops
    git clone https://github.com/Xiuyu-Li/q-diffusion
    python -m benchmarks.oracles.run qdiffusion --checkout q-diffusion --seeds 0 1 2
    common="--coverage paper --images 16 --held-images 16 --scales 1"
    python -m benchmarks.oracles.run quest --checkout QuEST $common --groups 20 --rounding 300 --tuning 64
    python -m benchmarks.oracles.run dgq --checkout DGQ $common --groups 20 --rounding 300 --recipe w4a6-dgq-paper
    python -m benchmarks.oracles.run qncd --checkout QNCD $common --rounding 300
    python -m benchmarks.oracles.run qncd --checkout QNCD $common --rounding 1 --bits w8a8 --seeds 0 1 2

Both see the same rows and are measured on the same calls of images that neither has seen: SQNR against full
precision, median over timesteps, pooled, and of the worst timestep. Seconds are of the processor, one thread.
Results are added to ``--output``. With ``--coverage paper``, what the authors' code saves is imported as a checkpoint
of ours, and has to compute the same: its SQNR against the authors' network is kept, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracles import dgq, qdiffusion, qncd, quest, tfmq
from benchmarks.oracles.authors import Network, Quantized, Rows
from benchmarks.oracles.budget import Budget
from benchmarks.oracles.report import table
from benchmarks.roundings import figures
from qdeploy.calibrate.published.layouts import LAYOUTS
from qdeploy.calibration_set.collect import collect
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.model.folder import open_model, read_json
from qdeploy.model.sampling import COLLECTING
from qdeploy.network.roles import find_structure
from qdeploy.quant.checkpoint import load_checkpoint
from qdeploy.quant.modes import weights_only
from qdeploy.recipe.coverage import covered, find_coverage
from qdeploy.store.files import write_json
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import machine
from qdeploy.workflows.calibrate import calibrate
from qdeploy.workflows.import_checkpoint import import_checkpoint


@dataclass(frozen=True)
class Theirs:
    """The code of a paper.

    Attributes:
        quantize: what it does.
        model: of the class of networks that its scripts take: DDIM's for CIFAR-10, or LDM's for text to image.
        whole: whether it runs only with its own coverage.
    """

    quantize: Callable[..., Quantized]
    model: str
    whole: bool = False


AUTHORS = {
    "qdiffusion": Theirs(qdiffusion.quantize, "digits"),
    "tfmq": Theirs(tfmq.quantize, "digits"),
    "quest": Theirs(quest.quantize, "scenes", whole=True),
    "dgq": Theirs(dgq.quantize, "scenes", whole=True),
    "qncd": Theirs(qncd.quantize, "scenes", whole=True),
}


def rows_of(data: CalibrationSet) -> Rows:
    """Inputs [N, C, H, W], timesteps [N] and contexts [N, L, D] of a set; unconditional networks have no contexts.

    Those of a timestep are together, the noisiest first.
    """
    inputs = data.inputs(list(range(len(data))))
    t = data.timesteps.flatten().float()
    order = torch.argsort(t, descending=True, stable=True)
    contexts = [inputs[name][order] for name in ("encoder_hidden_states",) if name in inputs]
    return inputs["sample"][order], t[order], *contexts


def outputs(network: Network, rows: Rows) -> Tensor:
    """Predictions for all rows."""
    with torch.no_grad():
        parts = torch.arange(len(rows[0])).split(64)
        return torch.cat([network(*(value[part] for value in rows)) for part in parts])


def imported(saved: Mapping[str, Any], method: str, timesteps: list[float], place: Path) -> Network:
    """The checkpoint that `qdeploy import-checkpoint` makes of what the authors' code saves."""
    file = place.with_suffix(".pth")
    torch.save(saved, file)
    model = AUTHORS[method].model
    made = import_checkpoint(file, model, place, method=method, timesteps=timesteps, overwrite=True)
    return as_function(load_checkpoint(made).eval())


def main() -> None:
    """Measure what is asked, write it, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=[*AUTHORS, "table"])
    parser.add_argument("--checkout", type=Path, help="folder of the authors' repository")
    parser.add_argument("--bits", default="w4a8", choices=["w4a8", "w8a8", "w4a6", "w8a6"])
    parser.add_argument("--coverage", default="portable", help="of ours; `paper` is the authors' own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounding", type=int, default=500, help="steps for each unit's roundings")
    parser.add_argument("--scales", type=int, default=100, help="steps for each unit's activation scales")
    parser.add_argument("--tuning", type=int, default=200, help="steps for each of QuEST's alignments")
    parser.add_argument("--images", type=int, default=32, help="calibration images, 20 calls of each")
    parser.add_argument("--held-images", type=int, default=32)
    parser.add_argument("--groups", type=int, default=1, help="of timesteps, in ours")
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--recipe", help="of ours, in place of the method's own preset: a name or a file")
    parser.add_argument("--work", type=Path, default=Path("runs/oracles"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/oracles.json"))
    given = parser.parse_args()
    content = read_json(given.output) if given.output.exists() else {"results": []}
    kept = content["results"]
    if given.method == "table":
        print(table(kept).markdown())
        return
    if AUTHORS[given.method].whole and given.coverage != "paper":
        parser.error(f"{given.method}'s code runs with its own coverage: --coverage paper")
    torch.set_num_threads(1)
    for seed in given.seeds:
        rows = Data(seed, given)
        for who, side in (("ours", by_us), ("theirs", by_the_authors)):
            if given.only in (None, who):
                asked = {
                    "method": given.method,
                    "model": AUTHORS[given.method].model,
                    "bits": given.bits,
                    "coverage": given.coverage,
                    "seed": seed,
                    "who": who,
                }
                kept.append({**asked, "steps": [given.rounding, given.scales], **side(seed, rows, given)})
                print(kept[-1], flush=True)
                write_json(given.output, {**content, "machine": machine()})
    print(table(kept).text())


class Data:
    """What both sides calibrate on and are measured on, of one seed.

    Args:
        seed: of the calibration images; those that are held out are always the same.
        given: the command line.
    """

    def __init__(self, seed: int, given: argparse.Namespace) -> None:
        given.work.mkdir(parents=True, exist_ok=True)
        model = AUTHORS[given.method].model
        name = "" if model == "digits" else f"{model}-"
        sampling = replace(COLLECTING, steps=50, scheduler="ddim", batch=32)
        self.set = collect(
            model, given.work / f"{name}set-{seed}-{given.images}", replace(sampling, seed=1000 * seed), keep=20,
            samples=given.images,
        )  # fmt: skip
        unseen = collect(
            model, given.work / f"{name}held-{given.held_images}", replace(sampling, seed=77_000), keep=20,
            samples=given.held_images,
        )  # fmt: skip
        self.model = open_model(model).load().float().eval()
        self.data = CalibrationSet.open(self.set.path)
        self.held = rows_of(CalibrationSet.open(unseen.path))
        self.reference = outputs(as_function(self.model), self.held)

    def measured(self, network: Network) -> dict[str, float]:
        """Figures of a network on the held-out rows."""
        return self.between(outputs(network, self.held), self.reference)

    def between(self, output: Tensor, reference: Tensor) -> dict[str, float]:
        """Figures of predictions for the held-out rows against others."""
        return {key: round(value, 1) for key, value in figures(reference, output, self.held[1]).items()}


def by_us(seed: int, rows: Data, given: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, and measure the simulation."""
    coverage = coverage_of(given)
    place = given.work / f"ours-{given.method}-{given.bits}-{coverage}-{seed}-{given.rounding}-{given.groups}"
    began = time.process_time()
    checkpoint = calibrate(
        AUTHORS[given.method].model, place, recipe=given.recipe, method=None if given.recipe else given.method,
        weights=f"uint{given.bits[1]}", activations=f"uint{given.bits[3]}", coverage=coverage, target="simulated",
        calibration=rows.set, seed=seed, timestep_groups=given.groups,
        effort=f"fast,rows={len(rows.data)},batch=32,rounding={given.rounding},scales={given.scales},tuning={given.tuning}",
    )  # fmt: skip
    seconds = time.process_time() - began
    quantized = load_checkpoint(checkpoint).eval()
    network = as_function(quantized)
    with weights_only(quantized):
        alone = rows.measured(network)
    return {
        "recipe": Path(given.recipe or given.method).stem,
        "groups": given.groups,
        "weights alone": alone,
        given.bits: rows.measured(network),
        "cpu_seconds": round(seconds),
    }


def by_the_authors(seed: int, rows: Data, given: argparse.Namespace) -> dict[str, Any]:
    """Let their code quantize, measure its network, and import what it saves where it is what their script writes."""
    layers = None
    if given.coverage != "paper":
        structure = find_structure(rows.model, rows.data.inputs([0]))
        layers = {layer.path for layer in covered(structure, find_coverage(given.coverage))}
    budget = Budget(int(given.bits[1]), int(given.bits[3]), given.rounding, given.scales, given.tuning)
    calibrated = rows_of(rows.data)
    torch.manual_seed(seed)
    began = time.process_time()
    made = AUTHORS[given.method].quantize(given.checkout, rows.model, calibrated, budget, layers)
    seconds = time.process_time() - began
    theirs = outputs(made.network, rows.held)
    found: dict[str, Any] = {
        given.bits: rows.between(theirs, rows.reference),
        "cpu_seconds": round(seconds),
    }
    if layers is None and given.method in LAYOUTS:  # the file then is what their script writes
        place = given.work / f"theirs-{given.method}-{given.bits}-{seed}"
        timesteps = calibrated[1].unique().flip(0).tolist()
        try:
            again = outputs(imported(made.saved, given.method, timesteps, place), rows.held)
            found["imported"] = rows.between(again, theirs)
        except InvalidInputError as error:  # what it holds has no place in our quantizers
            found["refused"] = str(error)
    return found


def coverage_of(given: argparse.Namespace) -> str:
    """The name of our coverage."""
    return f"{given.method}-paper" if given.coverage == "paper" else str(given.coverage)


def as_function(network: nn.Module) -> Network:
    """A diffusers network as the authors' are called."""

    def predict(x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        given = dict(zip(("encoder_hidden_states",), context, strict=False))
        return network(sample=x, timestep=t, **given).sample  # type: ignore[no-any-return]

    return predict


if __name__ == "__main__":
    main()
