"""``demo``, ``sample``, ``check``, ``benchmark`` and ``report``: how good and how fast it is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from qdeploy.commands import complete
from qdeploy.commands.base import print_result, report_made, verb
from qdeploy.commands.options import Verb, place_options, sampling_of, sampling_options
from qdeploy.model.sampling import AS_COLLECTED, COLLECTING, SAMPLING
from qdeploy.system.errors import CheckFailed, UsageError
from qdeploy.system.progress import say

_DEMO = Verb("qdeploy.workflows.demo", "demo")
_AUTO = Verb("qdeploy.workflows.auto", "auto")
_TUNE = Verb("qdeploy.workflows.tune", "tune")
_SAMPLE = Verb("qdeploy.sampling.sample", "sample")
_CHECK = Verb("qdeploy.evaluate.check", "check")
_BENCHMARK = Verb("qdeploy.evaluate.benchmark", "benchmark")
_PIPELINES = Verb("qdeploy.evaluate.pipeline_speed", "benchmark_pipelines")
_REPORT = Verb("qdeploy.evaluate.report_page.run", "report")

_AS = "ddim, euler, ... or a diffusers class.  [default: as its calibration set]"
_HEIGHT = "Height of the images in pixels.  [default: as its calibration set]"
_CORRECTION = "Take mean errors out of predictions: none, table, online, or online:EVERY,GUARD."


@click.command()
@_DEMO.option("output", "Folder to write.")
@verb
def demo(as_json: bool, **options: Any) -> None:
    """The whole way on a model that the package ships."""
    result = _DEMO.call(**options)
    print_result(as_json, result.to_json, lambda: result.table)


@click.command()
@click.argument("model", shell_complete=complete.models)
@_AUTO.option("output", "Folder of everything that is made.", required=True)
@_AUTO.option("backend", "openvino, onnxruntime or tensorrt.", "--for", "--backend")
@_AUTO.option("min_psnr", "Least PSNR of images to those of full precision, in dB.")
@_AUTO.option("calibration_samples", "Images to calibrate on.")
@_AUTO.option("samples", "Images to check on.")
@_AUTO.option("effort", "Of calibrations: fast, balanced, thorough or best.")
@_AUTO.option("rounds", "Interleaved rounds of the benchmark.")
@_AUTO.option("explain", "Print the commands that this stands for, and stop.")
@sampling_options(replace(COLLECTING, steps=50))
@verb
def auto(model: str, as_json: bool, **options: Any) -> None:
    """From a model to a checked engine, its speed and a report, by one command."""
    result = _AUTO.call(model, **sampling_of(options))
    print_result(as_json, result.to_json, result.as_text)
    if not result.passed:
        raise CheckFailed("; ".join(result.chosen.failures))


@click.command()
@click.argument("model", shell_complete=complete.models)
@_TUNE.option("output", "Folder of everything that is made.", required=True)
@_TUNE.option("min_psnr", "Least PSNR of images to those of full precision with many steps, in dB.")
@_TUNE.option("schedulers", "A scheduler to try.  [default: ddim, dpm++, unipc]", "--try-scheduler")
@_TUNE.option("try_steps", "A number of steps to try.  [default: 4, 6, 8, 12, 16, 20, 24, 32]")
@_TUNE.option("reference_steps", "Steps of the reference.")
@_TUNE.option("backend", "openvino, onnxruntime or tensorrt.", "--for", "--backend")
@_TUNE.option("calibration_samples", "Images to calibrate on.")
@_TUNE.option("samples", "Images to compare.")
@_TUNE.option("effort", "Of the calibration: fast, balanced, thorough or best.")
@sampling_options(replace(COLLECTING, steps=50), steps="Sampling steps of the calibration set.")
@verb
def tune(model: str, as_json: bool, **options: Any) -> None:
    """Scheduler, steps, precision and placement by measured quality and seconds; exit code 3 if none will do."""
    result = _TUNE.call(model, **sampling_of(options))
    print_result(as_json, result.to_json, result.table)
    if not result.passed:
        raise CheckFailed(f"no trial has a PSNR of {result.min_psnr:g} dB")


@click.command()
@click.argument("source")
@_SAMPLE.option("output", "Folder to write.", required=True)
@_SAMPLE.option("samples", "Images to sample.  [default: one for each prompt, or 16]")
@click.option("--count", type=int, hidden=True)  # until 0.4
@_SAMPLE.option("model", "The model whose pipeline is used.  [default: the one the engine was made from]")
@_SAMPLE.option("correction", _CORRECTION)
@_SAMPLE.option("npz", "Also write images.npz, as the evaluation suite of ADM reads it.")
@_SAMPLE.option("shards", "Images in tar files of at most so many, as webdataset reads them.")
@sampling_options(SAMPLING)
@_SAMPLE.option("device", "Torch device of the pipeline: cpu, cuda, cuda:N.")
@_SAMPLE.option("overwrite", "Replace another artifact at the output.")
@place_options(_SAMPLE)
@verb
def sample(source: str, count: int | None, as_json: bool, **options: Any) -> None:
    """Sample images with an engine, a checkpoint or a model."""
    began = time.perf_counter()
    if count is not None:
        say("--count is now called --samples: the old word goes with the next version")
        options["samples"] = count
    report_made(_SAMPLE.call(source, **sampling_of(options)), began, as_json)


@click.command()
@click.argument("subject")
@_CHECK.option("reference", "The full-precision model to compare quality with.")
@_CHECK.option("onnx", "Also compare with this ONNX bundle.")
@_CHECK.option("checkpoint", "Also compare with this checkpoint.")
@_CHECK.option("before", "Compare the error by timestep with this engine or checkpoint.")
@_CHECK.option("pictures", "Folder for pictures of ranges and error over time.")
@_CHECK.option("samples", "Images for paired quality.")
@_CHECK.option("keep", "Denoiser calls of each image at which SQNR is taken.")
@_CHECK.option("min_parity", "dB.  [default: 45, for engines at f32 40]")
@_CHECK.option("min_sqnr", "dB, median over timesteps.  [default: 20]")
@_CHECK.option("min_psnr", "dB, of images on the same seeds.")
@_CHECK.option("min_speedup", "Times as fast as the 16-bit engine, measured here; needs --reference.")
@_CHECK.option("max_fd_increase", "FD-local above the reference's.")
@_CHECK.option("features", "Feature network: a folder, or Inception's weights file.")
@_CHECK.option("real", "Folder of real images to compare sets with.")
@_CHECK.option("lpips", "Folder with LPIPS's weights.")
@_CHECK.option("clip", "CLIP model for the score of prompts: a folder or a Hub id.")
@_CHECK.option("correction", _CORRECTION)
@_CHECK.option("device", "Torch device of the reference and of checkpoints: cpu, cuda, cuda:N.")
@place_options(_CHECK)
@sampling_options(
    AS_COLLECTED, scheduler=_AS, height=_HEIGHT, seed="Chooses the images: none that a calibration set holds."
)
@verb
def check(subject: str, as_json: bool, **options: Any) -> None:
    """Compare with the simulation and with full precision; exit code 3 if a threshold is missed."""
    from qdeploy.system.processes import is_main_process

    result = _CHECK.call(subject, **sampling_of(options))
    if is_main_process():
        print_result(as_json, result.to_json, result.table)
    if not result.passed:
        raise CheckFailed("; ".join(result.failures))


@click.command()
@click.argument("paths", nargs=-1, required=True)
@_BENCHMARK.option("reference", "The full-precision model.  [default: the one the engines were made from]")
@_BENCHMARK.option("rounds", "Interleaved measurements of each.")
@_BENCHMARK.option("threads", "CPU threads.  [default: all]")
@click.option("--pipeline", is_flag=True, help="Whole pipelines, from prompt to image, compared with torch.")
@sampling_options(
    replace(SAMPLING, batch=1), batch="Samples in each call of an engine; of a pipeline, images at a time."
)
@verb
def benchmark(paths: tuple[str, ...], pipeline: bool, as_json: bool, **options: Any) -> None:
    """Latency of engines and of the full-precision and 16-bit engines of the same model, in one run."""
    if pipeline:
        result = _PIPELINES.call(paths, **sampling_of(options))
    else:
        context, own = click.get_current_context(), set(_BENCHMARK.parameters)
        for name in options.keys() - own:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(
                    f"--{name.replace('_', '-')} is about whole pipelines: it goes with --pipeline"
                )
        result = _BENCHMARK.call(paths, **{name: options[name] for name in options.keys() & own})
    print_result(as_json, result.to_json, result.table)


@click.command()
@click.argument("paths", nargs=-1, required=True)
@_REPORT.option("output", "HTML file.")
@_REPORT.option("reference", "The full-precision model.  [default: the one they were made from]")
@_REPORT.option("checks", "A result of `check --json`.", "--check", type=str)
@_REPORT.option("benchmark", "The result of `benchmark --json`.  [default: measured]", type=str)
@_REPORT.option("sensitivity", "A folder that `qdeploy sensitivity` wrote.")
@_REPORT.option("shown", "Seeds to show images of.")
@click.option("--pictures", type=int, hidden=True)  # until 0.4
@_REPORT.option("samples", "Images for paired quality.")
@_REPORT.option("speed_batch", "Samples in each call of an engine, in measurements of speed.")
@_REPORT.option("rounds", "Interleaved measurements of speed.")
@_REPORT.option("device", "Torch device of the reference, of checkpoints and of pictures.")
@sampling_options(AS_COLLECTED, scheduler=_AS, height=_HEIGHT, seed="Chooses the images of checks.")
@verb
def report(paths: tuple[str, ...], pictures: int | None, as_json: bool, **options: Any) -> None:
    """One HTML file with pictures, errors, speed and provenance; what is not given is measured."""
    if pictures is not None:
        say("--pictures is now called --shown: the old word goes with the next version")
        options["shown"] = pictures
    result = _REPORT.call(paths, **sampling_of(options))
    print_result(as_json, result.to_json, result.text)
