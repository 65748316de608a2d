"""``sweep``: many calibrations in one table; ``work``: parts of a verb in a job of one's own scheduler."""

from __future__ import annotations

import time
from typing import Any

import click

from qdeploy.commands import complete
from qdeploy.commands.base import print_result, report_made, verb
from qdeploy.commands.options import Verb, place_options, sampling_of, sampling_options
from qdeploy.model.sampling import AS_COLLECTED

_SWEEP = Verb("qdeploy.workflows.sweep", "sweep")
_WORK = Verb("qdeploy.workflows.work", "work")


@click.command()
@click.argument("model", shell_complete=complete.models)
@_SWEEP.option("output", "Folder to write.", required=True)
@_SWEEP.option(
    "recipes",
    "A preset's name or a YAML file.",
    "-r",
    "--recipe",
    required=True,
    shell_complete=complete.presets,
)
@_SWEEP.option("seeds", "Seed of calibrations.  [default: 0, 1 and 2]", "--calibration-seed", type=int)
@_SWEEP.option("effort", "Of all calibrations: fast, balanced, thorough or best.  [default: the recipes']")
@_SWEEP.option("calibration", "A calibration set.  [default: one is collected for each seed]")
@_SWEEP.option("samples", "Images for paired quality.")
@_SWEEP.option("keep", "Denoiser calls of each image at which SQNR is taken.")
@sampling_options(AS_COLLECTED)
@_SWEEP.option("device", "Torch device: cpu, cuda, cuda:N.")
@_SWEEP.option("overwrite", "Replace other results at the output.")
@place_options(_SWEEP)
@verb
def sweep(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Recipes and seeds, each calibrated and compared with full precision, in one table."""
    result = _SWEEP.call(model, output, **sampling_of(options))
    print_result(as_json, result.to_json, result.table)


@click.command()
@click.argument("plan")
@_WORK.option("part", "Every N-th part from the K-th on: K/N, K from 1.  [default: all parts]")
@_WORK.option("finish", "Carry out the rest of the verb, when all parts are there.")
@_WORK.option(
    "publish", "Copy the plan to an object store (s3://..., gs://...), for machines without a common disk."
)
@verb
def work(plan: str, as_json: bool, **options: Any) -> None:
    """Make parts of a plan that a verb wrote with `--on plan`; run it as often and as often at once as you like."""
    began = time.perf_counter()
    result = _WORK.call(plan, **options)
    if result.result is None:
        print_result(
            as_json,
            result.to_json,
            lambda: f"{result.made} of {result.parts} parts of {result.plan} are there",
        )
    elif hasattr(result.result, "to_json"):
        print_result(as_json, result.result.to_json, result.result.table)
    else:
        report_made(result.result, began, as_json)
