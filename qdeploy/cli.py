"""The command line: each verb parses, calls one function and prints. No logic.

Results go to stdout, as text or with ``--json`` as one JSON object; everything else goes to stderr.
Imports of what does the work happen inside the verbs, so that ``qdeploy --help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qdeploy.system.errors import CheckFailed, QDeployError
from qdeploy.system.progress import verbosity
from qdeploy.version import __version__

# Read when torch is imported. Threads that spin while they wait slow down each other, by more than ten times
# where other work runs beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


class _Commands(click.Group):
    """A group whose errors are one sentence and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        debug = "--debug" in sys.argv
        try:
            kwargs["standalone_mode"] = False
            code = super().main(*args, **kwargs)
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("stopped: run the same command again to continue", 130)
        except QDeployError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except Exception as error:
            if debug:
                raise
            _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> None:
    print(f"qdeploy: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def verb(function: F) -> F:
    """The options that every verb has."""

    @functools.wraps(function)
    def run(*args: Any, quiet: bool, verbose: int, debug: bool, **kwargs: Any) -> Any:
        verbosity.level = 0 if quiet else 1 + verbose
        _silence_libraries(debug)
        return function(*args, **kwargs)

    for option in (
        click.option("--debug", is_flag=True, help="Show tracebacks and the messages of libraries."),
        click.option("-v", "--verbose", count=True, help="Say more."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    ):
        run = option(run)
    return run  # type: ignore[return-value]


def _silence_libraries(debug: bool) -> None:
    if debug:
        return
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _report(
    result: Any,
    began: float,
    as_json: bool,
    more: Callable[[Any], dict[str, Any]] | None = None,
    table: Callable[[Any], str] | None = None,
) -> None:
    """Print what a verb that writes an artifact (or only estimates one) came to, and what it holds."""
    from qdeploy.store.artifact import Artifact

    if isinstance(result, Artifact):
        summary = result.summary(time.perf_counter() - began) | (more(result) if more else {})
        text = f"{table(result)}\n" if table else ""
        text += (
            f"{summary['kind']} {summary['path']} ({summary['sha256'][:12]}) in {summary['seconds']:.1f} s"
        )
    else:
        summary = {"estimate": {"seconds": round(result.seconds, 3), "bytes": int(result.bytes)}}
        text = f"estimated: {result}"
    click.echo(json.dumps(summary) if as_json else text)


OUTPUT = click.option("-o", "--output", type=FOLDER, help="Folder to write.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace another artifact at the output.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Where all randomness comes from.")
DEVICE = click.option("--device", default="cpu", show_default=True, help="Torch device.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
_PROMPT_OPTIONS = (
    click.option("--prompts", type=FOLDER, help="Text file, one prompt per line; or COCO captions, *.json."),
    click.option("--prompt-count", type=int, help="Prompts to take from the file.  [default: up to 5000]"),
    click.option("--prompt-seed", type=int, help="Draw them at random.  [default: the first ones]"),
)
GUIDANCE = click.option("--guidance", type=float, help="Classifier-free guidance scale.")
SCHEDULER = click.option("--scheduler", help="ddim, pndm, euler, dpm++, ... or a diffusers class.")
ETA = click.option("--eta", type=float, help="DDIM's eta.")
BATCH = click.option("--batch", type=int, default=16, show_default=True, help="Images at a time.")
CORRECTION = click.option(
    "--correction",
    type=click.Choice(["none", "table", "online"]),
    default="none",
    show_default=True,
    help="Take mean errors out of predictions: from the calibration's table, or estimated on the way.",
)


def prompted(function: F) -> F:
    """Options that name prompts; the function is given the prompts themselves."""

    @functools.wraps(function)
    def run(
        *args: Any, prompts: Path | None, prompt_count: int | None, prompt_seed: int | None, **kwargs: Any
    ) -> Any:
        return function(*args, prompts=_prompts(prompts, prompt_count, prompt_seed), **kwargs)

    for option in _PROMPT_OPTIONS[::-1]:
        run = option(run)
    return run  # type: ignore[return-value]


def sampling(function: F) -> F:
    """The options of every verb that runs a whole pipeline."""
    size = (click.option("--height", type=int), click.option("--width", type=int))
    function = prompted(function)
    for option in reversed((*size, SCHEDULER, ETA, GUIDANCE, BATCH, SEED)):
        function = option(function)
    return function


def tensorrt(function: F) -> F:
    """The options that only builds with TensorRT have."""
    for option in (
        click.option(
            "--shapes", help="TensorRT: NAME:MIN,OPT,MAX;...  [default: from the graph and --batch]"
        ),
        click.option(
            "--timing-cache", type=FOLDER, help="TensorRT: keeps timings of kernels between builds."
        ),
        click.option("--workspace", type=float, help="TensorRT: GiB of scratch memory.  [default: all]"),
        click.option("--refit", is_flag=True, help="TensorRT: weights can be replaced later."),
        click.option("--weight-streaming", is_flag=True, help="TensorRT: weights need not fit on the GPU."),
        click.option("--hardware-compatible", is_flag=True, help="TensorRT: for every GPU from Ampere on."),
        click.option("--version-compatible", is_flag=True, help="TensorRT: for later versions of it."),
        click.option("--strip-plan", is_flag=True, help="TensorRT: weights stay outside of the plan."),
        click.option("--optimization-level", type=int, help="TensorRT: 0 to 5, how long to search.  [3]"),
    )[::-1]:
        function = option(function)
    return function


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="qdeploy")
def main() -> None:
    """From a diffusion model to a measured low-bit engine."""


@main.command()
@click.option("-o", "--output", type=FOLDER, default=Path("qdeploy-demo"), show_default=True)
@verb
def demo(as_json: bool, **options: Any) -> None:
    """The whole way on a model that the package ships."""
    from qdeploy.workflows.demo import demo

    result = demo(**options)
    click.echo(json.dumps(result.to_json()) if as_json else result.table)


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder to write.")
@click.option("--steps", type=int, default=20, show_default=True, help="Denoiser calls to keep per image.")
@click.option("--samples", type=int, default=64, show_default=True, help="Images to sample.")
@click.option("--inference-steps", type=int, default=100, show_default=True, help="Length of the trajectory.")
@click.option("--from-qdiffusion", type=FOLDER, help="Import Q-Diffusion's .pt file instead of sampling.")
@sampling
@DEVICE
@DRY_RUN
@OVERWRITE
@verb
def collect(model: str, from_qdiffusion: Path | None, as_json: bool, **options: Any) -> None:
    """Record a calibration set: denoiser inputs along the sampling trajectory."""
    began = time.perf_counter()
    if from_qdiffusion:
        from qdeploy.calibration_set.importers import import_qdiffusion

        kept = {name: options[name] for name in ("output", "samples", "seed", "overwrite")} | {
            "keep": options["steps"]
        }
        _report(import_qdiffusion(model, from_qdiffusion, **kept), began, as_json)
        return
    from qdeploy.calibration_set.collect import collect

    _report(collect(model, **options), began, as_json)


@main.command()
@click.argument("model")
@OUTPUT
@click.option("-r", "--recipe", help="A preset's name or a YAML file.")
@click.option("--calibration", type=FOLDER, help="A set that `qdeploy collect` wrote.")
@click.option("--method", help="minmax, qdiffusion, ...: see `qdeploy methods`.")
@click.option("--weights", help="Weight format: int8, int4, int4b128, fp8, ...")
@click.option("--activations", help="Activation format: int8, ... or none.")
@click.option("--coverage", help="Which layers: portable, qdiffusion-paper, ...")
@click.option("--target", help="What the result must run on.")
@click.option("--effort", help="fast, balanced or best.")
@click.option("--exclude", multiple=True, help="Shell glob of layers that stay in float; repeatable.")
@click.option(
    "--timestep-groups",
    help="Groups of timesteps with scales of their own: how many, or boundaries such as 200,500.",
)
@click.option(
    "--budget",
    multiple=True,
    help="Choose formats layer by layer: size=3.2MB, size=50%, macs=5%; repeatable.",
)
@click.option("--sensitivity", type=FOLDER, help="For --budget: what `qdeploy sensitivity` wrote.")
@click.option(
    "--max-memory", type=float, default=4.0, show_default=True, help="GiB for recorded activations."
)
@click.option("--seed", type=int, help="Where all randomness comes from.  [default: 0]")
@DEVICE
@DRY_RUN
@OVERWRITE
@verb
def calibrate(model: str, exclude: tuple[str, ...], max_memory: float, as_json: bool, **options: Any) -> None:
    """Quantize a model: integer weights and scales."""
    from qdeploy.mixed.result import budget_summary
    from qdeploy.workflows.calibrate import calibrate

    began = time.perf_counter()
    result = calibrate(model, exclude=exclude or None, max_memory=int(max_memory * 2**30), **options)
    _report(result, began, as_json, budget_summary)


@main.command()
@click.argument("source")
@OUTPUT
@click.option("-r", "--recipe", help="A preset's name or a YAML file: which layers, which finders of ranges.")
@click.option("--calibration", type=FOLDER, help="A set that `qdeploy collect` wrote.")
@click.option("--reference", help="For a checkpoint: its model.  [default: the one it was made from]")
@click.option("--method", help="minmax, qdiffusion, ...: whose finders of ranges.")
@click.option("--formats", help="Weight formats to try, such as int8,int4.  [default: 3 to 8 bits]")
@click.option("--activations", help="Activation format: int8, ... or none.")
@click.option("--coverage", help="Which layers: portable, ...")
@click.option("--target", help="What the result must run on.")
@click.option("--exclude", multiple=True, help="Shell glob of layers that stay in float; repeatable.")
@click.option("--rows", type=int, default=32, show_default=True, help="Calibration rows to measure on.")
@click.option("--probes", type=int, default=4, show_default=True, help="Backward passes of the cheap pass.")
@click.option("--cheap", is_flag=True, help="The cheap pass alone: estimates for all layers from gradients.")
@click.option("--seed", type=int, help="Where all randomness comes from.  [default: 0]")
@DEVICE
@DRY_RUN
@OVERWRITE
@verb
def sensitivity(
    source: str, formats: str | None, exclude: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Rank layers by the harm of quantizing each, in each bit width."""
    from qdeploy.mixed.result import summary, table
    from qdeploy.mixed.sensitivity import sensitivity

    began, listed = time.perf_counter(), formats.split(",") if formats else None
    result = sensitivity(source, formats=listed, exclude=exclude or None, **options)
    _report(result, began, as_json, summary, table)


@main.command()
@click.argument("source")
@OUTPUT
@click.option("--target", help="Dialect of Q/DQ.  [default: what the checkpoint was calibrated for]")
@click.option("--calibration", type=FOLDER, help="For a model: the set that its probe comes from.")
@click.option("--time-table", help="Features of the timestep from a table: none, fp32, fp16 or int8.")
@click.option("--table-rows", default="all", show_default=True, help="Its rows: all, or a schedule: ddim:50.")
@click.option("--components/--no-components", default=True, help="Also text encoders and autoencoder.")
@OVERWRITE
@verb
def export(source: str, as_json: bool, **options: Any) -> None:
    """Write a checkpoint, or a model in full precision, as ONNX."""
    from qdeploy.export.run import export

    began = time.perf_counter()
    _report(export(source, **options), began, as_json)


@main.command("build-engine")
@click.argument("onnx", type=FOLDER)
@OUTPUT
@click.option("--backend", default="auto", show_default=True, help="tensorrt, openvino or onnxruntime.")
@click.option("--precision", help="What is not integer: f32, bf16 or f16.  [default: f32; optimized: bf16]")
@click.option("--optimize-for", help="latency: keep int8 only where it is measured to pay.")
@click.option("--min-sqnr", type=float, help="Least SQNR that --optimize-for may end with, in dB.")
@click.option("--batch", type=int, default=1, show_default=True, help="Batch size that is measured.")
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
@tensorrt
@OVERWRITE
@verb
def build_engine(onnx: Path, as_json: bool, **options: Any) -> None:
    """Build an engine from an ONNX bundle, and measure it."""
    from qdeploy.engines.build import build_engine

    began = time.perf_counter()
    _report(build_engine(onnx, **options), began, as_json)


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder to write.")
@click.option("-n", "--count", type=int, default=16, show_default=True, help="Number of images.")
@click.option("--steps", type=int, default=50, show_default=True, help="Sampling steps.")
@click.option(
    "--model", help="The model whose pipeline is used.  [default: the one the engine was made from]"
)
@CORRECTION
@sampling
@OVERWRITE
@verb
def sample(source: str, as_json: bool, **options: Any) -> None:
    """Sample images with an engine, a checkpoint or a model."""
    from qdeploy.sampling.sample import sample

    began = time.perf_counter()
    _report(sample(source, **options), began, as_json)


@main.command()
@click.argument("subject", type=FOLDER)
@click.option("--reference", help="The full-precision model to compare quality with.")
@click.option("--onnx", type=FOLDER, help="Also compare with this ONNX bundle.")
@click.option("--checkpoint", type=FOLDER, help="Also compare with this checkpoint.")
@click.option("--before", type=FOLDER, help="Compare the error by timestep with this engine or checkpoint.")
@click.option("--pictures", type=FOLDER, help="Folder for pictures of ranges and error over time.")
@click.option("--samples", type=int, default=64, show_default=True, help="Images for paired quality.")
@click.option("--steps", type=int, default=20, show_default=True, help="Timesteps at which SQNR is taken.")
@click.option("--inference-steps", type=int, default=50, show_default=True, help="Length of the trajectory.")
@click.option("--min-parity", type=float, help="dB.  [default: 45, for engines at f32 40]")
@click.option("--min-sqnr", type=float, help="dB, median over timesteps.  [default: 20]")
@click.option("--min-psnr", type=float, help="dB, of images on the same seeds.")
@click.option("--max-fd-increase", type=float, help="FD-local above the reference's.")
@click.option("--scheduler", help="ddim, euler, ...  [default: as its calibration set]")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the held-out trajectories.")
@click.option("--features", type=FOLDER, help="Feature network: a folder, or Inception's weights file.")
@click.option("--real", type=FOLDER, help="Folder of real images to compare sets with.")
@click.option("--lpips", type=FOLDER, help="Folder with LPIPS's weights.")
@click.option("--clip", help="CLIP model for the score of prompts: a folder or a Hub id.")
@CORRECTION
@prompted
@GUIDANCE
@click.option("--height", type=int, help="Of the images.  [default: as its calibration set]")
@click.option("--width", type=int)
@verb
def check(subject: Path, as_json: bool, **options: Any) -> None:
    """Compare with the simulation and with full precision; exit code 3 if a threshold is missed."""
    from qdeploy.evaluate.check import check
    from qdeploy.evaluate.shared_work import is_main_process

    result = check(subject, **options)
    if is_main_process():
        click.echo(json.dumps(result.to_json()) if as_json else result.table())
    if not result.passed:
        raise CheckFailed("; ".join(result.failures))


@main.command()
@click.argument("paths", nargs=-1, required=True, type=FOLDER)
@click.option("--reference", help="The full-precision model.  [default: the one the engines were made from]")
@click.option("--batch", type=int, multiple=True, default=(1,), show_default=True, help="Repeatable.")
@click.option("--rounds", type=int, default=30, show_default=True, help="Interleaved measurements of each.")
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
@verb
def benchmark(paths: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Latency beside the full-precision and 16-bit engines of the same model, in one run."""
    from qdeploy.evaluate.benchmark import benchmark

    result = benchmark(paths, **options)
    click.echo(json.dumps(result.to_json()) if as_json else result.table())


@main.command()
@click.argument("paths", nargs=-1, required=True, type=FOLDER)
@click.option(
    "-o", "--output", type=FOLDER, default=Path("report.html"), show_default=True, help="HTML file."
)
@click.option("--reference", help="The full-precision model.  [default: the one they were made from]")
@click.option("--check", "checks", multiple=True, type=FOLDER, help="What `check --json` said; repeatable.")
@click.option("--benchmark", type=FOLDER, help="What `benchmark --json` said.  [default: measured]")
@click.option("--sensitivity", type=FOLDER, help="A folder that `qdeploy sensitivity` wrote.")
@click.option("--pictures", type=int, default=8, show_default=True, help="Seeds to show images of.")
@click.option("--samples", type=int, default=64, show_default=True, help="Images for paired quality.")
@click.option("--inference-steps", type=int, default=50, show_default=True, help="Length of the trajectory.")
@click.option("--scheduler", help="ddim, euler, ...  [default: as its calibration set]")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the held-out trajectories.")
@click.option(
    "--batch", type=int, multiple=True, default=(1,), show_default=True, help="Of speed; repeatable."
)
@click.option("--rounds", type=int, default=30, show_default=True, help="Interleaved measurements of speed.")
@prompted
@GUIDANCE
@verb
def report(paths: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """One HTML file with pictures, errors, speed and provenance; what is not given is measured."""
    from qdeploy.evaluate.report_page.run import report

    result = report(paths, **options)
    click.echo(json.dumps(result.to_json()) if as_json else result.text())


@main.command()
@click.argument("source", metavar="ONNX", type=FOLDER)
@click.option("--target", default="tensorrt", show_default=True, help="Whose rules: see `qdeploy methods`.")
@click.option("--tensorrt", default="11.4", show_default=True, help="TensorRT's version.")
@click.option("--compute-capability", help="The GPU's, as 8.9.")
@click.option("--shapes", help="Smallest, optimal, largest: sample:1x4x64x64,2x4x64x64,8x4x64x64;...")
@click.option("--fix", is_flag=True, help="Mend what can be without changing the function; needs -o.")
@click.option("-o", "--output", type=FOLDER, help="ONNX file for the mended graph.")
@verb
def lint(source: Path, fix: bool, output: Path | None, as_json: bool, **options: Any) -> None:
    """Say what an engine would reject or run slowly, before a build; exit code 3 if it would reject."""
    from qdeploy.export.lint.run import lint
    from qdeploy.system.errors import UsageError

    if fix != (output is not None):
        raise UsageError("--fix and -o belong together: the mended graph is written beside the given one")
    result = lint(source, fix=output, **options)
    click.echo(json.dumps(result.to_json()) if as_json else result.table())
    if not result.passed:
        raise CheckFailed(f"{source}: {result.counts['E']} findings that an engine rejects")


@main.command()
@click.argument("path")
@verb
def inspect(path: str, as_json: bool) -> None:
    """Say what an artifact or a model is, and whether it is intact."""
    from qdeploy.workflows.inspect import description, inspect

    result = inspect(path)
    click.echo(json.dumps(result) if as_json else description(result))
    if not result["valid"]:
        from qdeploy.system.errors import InvalidInputError

        raise InvalidInputError(f"{path} is not valid: {result['problem']}")


@main.command()
@verb
def methods(as_json: bool) -> None:
    """List methods, stages, presets, formats, coverages, efforts and targets."""
    from qdeploy.workflows.inspect import as_text, vocabulary

    words = vocabulary()
    click.echo(json.dumps(words) if as_json else as_text(words))


@main.command()
@click.option("--require", help="A backend that has to be usable: exit code 4 with the reason if it is not.")
@verb
def doctor(require: str | None, as_json: bool) -> None:
    """What this machine can build and run, and how to get what is missing."""
    from qdeploy.engines.doctor import doctor

    result = doctor(require)
    click.echo(json.dumps(result.to_json()) if as_json else result.as_text())


@main.command()
@click.option("--backend", default="auto", show_default=True, help="tensorrt, openvino or onnxruntime.")
@click.option(
    "--precision", default="f32", show_default=True, help="What is not quantized: f32, bf16 or f16."
)
@click.option("--format", "formats", multiple=True, help="fp32, int8, int4, fp8; repeatable.  [default: all]")
@click.option("-o", "--output", type=FOLDER, help="File to write the report into, as JSON.")
@verb
def selftest(output: Path | None, as_json: bool, **options: Any) -> None:
    """Build and run tiny graphs on a backend, and compare with ONNX Runtime: one report to send."""
    from qdeploy.engines.selftest.run import selftest

    result = selftest(**options)
    if output is not None:
        from qdeploy.store.files import explained_os_errors, write_json

        with explained_os_errors(output):
            write_json(output, result.to_json())
    click.echo(json.dumps(result.to_json()) if as_json else result.table())
    if not result.passed:
        raise CheckFailed(result.failures)


def _prompts(file: Path | None, count: int | None, seed: int | None) -> list[str] | None:
    if file is None:
        if (count, seed) != (None, None):
            from qdeploy.system.errors import UsageError

            raise UsageError("--prompt-count and --prompt-seed choose from a file: name it with --prompts")
        return None
    from qdeploy.model.prompts import read_prompts

    return read_prompts(file, count, seed)


if __name__ == "__main__":
    main()
