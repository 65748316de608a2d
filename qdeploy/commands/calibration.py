"""``collect``, ``calibrate`` and ``sensitivity``: from a model to a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import click

from qdeploy.commands import complete
from qdeploy.commands.base import report_made, verb
from qdeploy.commands.options import Verb, place_options, sampling_of, sampling_options
from qdeploy.model.sampling import COLLECTING
from qdeploy.system.errors import InvalidInputError, UsageError

F = TypeVar("F", bound=Callable[..., Any])

_COLLECT = Verb("qdeploy.calibration_set.collect", "collect")
_RECORD = Verb("qdeploy.calibration_set.record", "record")
_RUNNING = {
    "seed": "Where all randomness comes from.  [default: 0]",
    "device": "Torch device.",
    "dry_run": "Try everything once, say what it would cost, and stop.",
    "overwrite": "Replace another artifact at the output.",
}
_OF_SCRIPTS = ("keep", "samples", "seed", "device", "overwrite")
_PREFLIGHT = Verb("qdeploy.workflows.preflight", "preflight")
_CALIBRATE = Verb("qdeploy.workflows.calibrate", "calibrate")
_IMPORT_CHECKPOINT = Verb("qdeploy.workflows.import_checkpoint", "import_checkpoint")
_SENSITIVITY = Verb("qdeploy.mixed.sensitivity", "sensitivity")
_IMPORT = Verb("qdeploy.calibration_set.importers", "import_qdiffusion")


def _running(verb: Verb, *names: str) -> Callable[[F], F]:
    """Options of a verb on how it runs, by their names in `_RUNNING`."""

    def decorate(function: F) -> F:
        for name in reversed(names):
            function = verb.option(name, _RUNNING[name])(function)
        return function

    return decorate


@click.command()
@click.argument("model", shell_complete=complete.models)
@_COLLECT.option("output", "Folder to write.", required=True)
@_COLLECT.option("samples", "Images to sample.")
@_COLLECT.option("keep", "Denoiser calls of each image to keep.")
@sampling_options(COLLECTING)
@click.option(
    "--from-qdiffusion",
    type=click.Path(path_type=Path),
    help="Import Q-Diffusion's .pt file instead of sampling.",
)
@click.option(
    "--script",
    type=click.Path(path_type=Path),
    help="Record a Python file's own calls of the pipeline: it defines calls(pipeline).",
)
@_running(_COLLECT, "device", "dry_run", "overwrite")
@place_options(_COLLECT)
@verb
def collect(
    model: str,
    output: str,
    from_qdiffusion: Path | None,
    script: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Record a calibration set: denoiser inputs along the sampling trajectory."""
    began = time.perf_counter()
    if script is not None:
        report_made(_record(model, output, script, from_qdiffusion, options), began, as_json)
        return
    if from_qdiffusion:
        kept = {name: options[name] for name in ("keep", "samples", "seed", "overwrite")}
        report_made(_IMPORT.call(model, from_qdiffusion, output, **kept), began, as_json)
        return
    given = sampling_of(options)
    made = _COLLECT.call(model, output, **given)
    if given["dry_run"]:
        _try_the_rest(model, given)
    report_made(made, began, as_json)


def _try_the_rest(model: str, given: dict[str, Any]) -> None:
    """Try what comes after a collection, too, and say what works.

    Raises:
        QDeployError: what does not.
    """
    known = {each.name for each in fields(COLLECTING)}
    _PREFLIGHT.call(model, **{name: value for name, value in given.items() if name in known}).require()


def _record(
    model: str, output: str, script: Path, from_qdiffusion: Path | None, options: dict[str, Any]
) -> Any:
    """Record a script's calls.

    Raises:
        UsageError: an option is given that the script has to say itself.
    """
    from qdeploy.calibration_set.script import Script

    kept = {name: options.pop(name) for name in _OF_SCRIPTS}
    defaults = {each.name: getattr(COLLECTING, each.name) for each in fields(COLLECTING)}
    for name, value in {**options, "from_qdiffusion": from_qdiffusion}.items():
        if value not in (None, (), False, defaults.get(name)):
            raise UsageError(
                f"--{name.replace('_', '-')} does not go with --script: the script calls the pipeline itself, with "
                "all that it needs"
            )
    return _RECORD.call(model, Script(script), output, **kept)


@click.command()
@click.argument("model", shell_complete=complete.models)
@sampling_options(COLLECTING)
@verb
def preflight(model: str, as_json: bool, **options: Any) -> None:
    """Say what will work with a model, what it costs and what not, before hours are spent; exit code 5 if not."""
    result = _PREFLIGHT.call(model, **sampling_of(options))
    click.echo(json.dumps(result.to_json()) if as_json else result.table())
    if not result.passed:
        raise InvalidInputError(str(result.problem))


@click.command()
@click.argument("model", shell_complete=complete.models)
@_CALIBRATE.option("output", "Folder to write.  [default: MODEL-PRECISION in the working directory]")
@_CALIBRATE.option(
    "recipe", "A preset's name or a YAML file.", "-r", "--recipe", shell_complete=complete.presets
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="STAGE.OPTION=VALUE",
    help="An option of one of the recipe's stages, such as round-weights.steps=5000. Repeatable.",
)
@_CALIBRATE.option("calibration", "A set that `qdeploy collect` wrote.")
@_CALIBRATE.option("method", "minmax, qdiffusion, ...: see `qdeploy methods`.")
@_CALIBRATE.option("weights", "Weight format: int8, int4, int4b128, fp8, ...")
@_CALIBRATE.option("activations", "Activation format: int8, ... or none.")
@_CALIBRATE.option("coverage", "Which layers: portable, qdiffusion-paper, ...")
@_CALIBRATE.option("target", "What the result must run on.")
@_CALIBRATE.option("effort", "fast, balanced, thorough or best.")
@_CALIBRATE.option("softmax", "Where attention is quantized, its softmax output: uint8, uint16 or none.")
@_CALIBRATE.option("exclude", "Shell glob of layers that stay in float.")
@_CALIBRATE.option(
    "timestep_groups",
    "Groups of timesteps with scales of their own: how many, or boundaries such as 200,500.",
    multiple=False,
)
@_CALIBRATE.option("budget", "Choose formats layer by layer: size=3.2MB, size=50%, macs=5%.")
@_CALIBRATE.option("sensitivity", "For --budget: what `qdeploy sensitivity` wrote.")
@_CALIBRATE.option("max_memory", "GiB for recorded activations.  [default: 4]", type=float)
@_CALIBRATE.option("data_parallel", "Share steps with the other processes that torchrun started.")
@_running(_CALIBRATE, *_RUNNING)
@verb
def calibrate(
    model: str, settings: Sequence[str], max_memory: float | None, as_json: bool, **options: Any
) -> None:
    """Quantize a model: integer weights and scales."""
    from qdeploy.mixed.result import budget_summary
    from qdeploy.system.processes import is_main_process

    began = time.perf_counter()
    if max_memory is not None and not 0 < max_memory < inf:
        raise UsageError(f"--max-memory must be a number of GiB above 0, not {max_memory}")
    memory = None if max_memory is None else int(max_memory * 2**30)
    result = _CALIBRATE.call(model, max_memory=memory, options=stage_options(settings), **options)
    if is_main_process() or not options["data_parallel"]:
        report_made(result, began, as_json, budget_summary)


def stage_options(settings: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Options by stage, from ``stage.option=value`` with values as YAML writes them.

    Raises:
        UsageError: the text is not of that form.
    """
    from qdeploy.store.bounded_yaml import parse_yaml

    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        stage, dot, option = name.rpartition(".")
        if not (equals and dot and stage and option):
            raise UsageError(
                f"--set cannot be read at {text!r}: write stage.option=value, as in round-weights.steps=5000"
            )
        try:
            found.setdefault(stage.strip(), {})[option.strip()] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set cannot be read at {text!r}: {str(error).splitlines()[0]}") from error
    return found or None


@click.command()
@click.argument("source")
@_SENSITIVITY.option("output", "Folder to write.  [default: SOURCE-sensitivity in the working directory]")
@_SENSITIVITY.option(
    "recipe", "A preset's name or a YAML file: which layers, which finders of ranges.", "-r", "--recipe"
)
@_SENSITIVITY.option("calibration", "A set that `qdeploy collect` wrote.")
@_SENSITIVITY.option("reference", "For a checkpoint: its model.  [default: the one it was made from]")
@_SENSITIVITY.option("method", "minmax, qdiffusion, ...: whose finders of ranges.")
@_SENSITIVITY.option(
    "formats",
    "Weight formats to try, such as int8,int4.  [default: 3 to 8 bits]",
    multiple=False,
)
@_SENSITIVITY.option("activations", "Activation format: int8, ... or none.")
@_SENSITIVITY.option("coverage", "Which layers: portable, ...")
@_SENSITIVITY.option("target", "What the result must run on.")
@_SENSITIVITY.option("exclude", "Shell glob of layers that stay in float.")
@_SENSITIVITY.option("rows", "Calibration rows to measure on.")
@_SENSITIVITY.option("probes", "Backward passes of the cheap pass.")
@_SENSITIVITY.option("cheap", "The cheap pass alone: estimates for all layers from gradients.")
@_running(_SENSITIVITY, *_RUNNING)
@place_options(_SENSITIVITY)
@verb
def sensitivity(source: str, formats: str | None, as_json: bool, **options: Any) -> None:
    """Rank layers by the harm of quantizing each, in each bit width."""
    from qdeploy.mixed.result import summary, table

    began, listed = time.perf_counter(), formats.split(",") if formats else None
    report_made(_SENSITIVITY.call(source, formats=listed, **options), began, as_json, summary, table)


@click.command("import-checkpoint")
@click.argument("file", type=click.Path(path_type=Path))
@_IMPORT_CHECKPOINT.option("model", "The model that it was made from.", required=True)
@_IMPORT_CHECKPOINT.option(
    "method", "Whose code wrote it: qdiffusion, tfmq, quest, dgq or brecq.", required=True
)
@_IMPORT_CHECKPOINT.option("output", "Folder to write.  [default: MODEL-METHOD in the working directory]")
@_IMPORT_CHECKPOINT.option(
    "weights", "Format of weights.  [default: uint4 or uint8, as their zero points are]"
)
@_IMPORT_CHECKPOINT.option("activations", "Format of activations, or none.  [default: uint8 or int8]")
@_IMPORT_CHECKPOINT.option(
    "timesteps",
    "What scales by step belong to, the noisiest first: 981,961,...  [default: the model's schedule]",
    multiple=False,
)
@_IMPORT_CHECKPOINT.option("merge_timesteps", "One range per activation that holds those of all timesteps.")
@_IMPORT_CHECKPOINT.option("float_attention", "Leave q, k, v and the softmax output in float.")
@_IMPORT_CHECKPOINT.option("target", "What the result must run on.  [default: an engine, where one can]")
@_running(_IMPORT_CHECKPOINT, "device", "overwrite")
@verb
def import_checkpoint(file: Path, model: str, as_json: bool, **options: Any) -> None:
    """Take over a quantized network as the authors of a method published it."""
    began = time.perf_counter()
    report_made(_IMPORT_CHECKPOINT.call(file, model, **options), began, as_json)
