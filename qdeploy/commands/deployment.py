"""``export``, ``build-engine``, ``push``, ``package``, ``lint``, ``doctor``, ``selftest``: from a checkpoint on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdeploy.commands.base import print_result, report_made, verb
from qdeploy.commands.options import Verb
from qdeploy.system.errors import CheckFailed, UsageError
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from qdeploy.store.artifact import EngineFolder

F = TypeVar("F", bound=Callable[..., Any])

_EXPORT = Verb("qdeploy.export.run", "export")
_GGUF = Verb("qdeploy.export.gguf", "export_gguf")
_BUILD = Verb("qdeploy.engines.build", "build_engine")
_PUSH = Verb("qdeploy.store.hub", "push")
_SIGN = Verb("qdeploy.store.sign", "sign")
_SIGNED = Verb("qdeploy.store.sign", "verify")
_PACKAGE = Verb("qdeploy.workflows.packaging.run", "package")
_LINT = Verb("qdeploy.export.lint.run", "lint")
_VERIFY = Verb("qdeploy.engines.tensorrt.verify", "verify")
_DOCTOR = Verb("qdeploy.engines.doctor", "doctor")
_SELFTEST = Verb("qdeploy.engines.selftest.run", "selftest")


@click.command()
@click.argument("source")
@_EXPORT.option("output", "Folder to write.  [default: SOURCE-onnx in the working directory]")
@_EXPORT.option("target", "Dialect of Q/DQ.  [default: what the checkpoint was calibrated for]")
@_EXPORT.option("calibration", "For a model: the set that its probe comes from.")
@_EXPORT.option("time_table", "Features of the timestep from a table: none, auto, fp32, fp16 or int8.")
@_EXPORT.option("table_rows", "Its rows: all, or a schedule: ddim:50.")
@_EXPORT.option("components", "Also text encoders and autoencoder.", "--pipeline/--no-pipeline", default=True)
@click.option("--no-components", is_flag=True, hidden=True)  # until 0.4
@_EXPORT.option("sizes", "Of images, in one graph: 512x512,768x512 or 512x512..1024x1024.")
@_EXPORT.option("overwrite", "Replace another artifact at the output.")
@verb
def export(source: str, no_components: bool, as_json: bool, **options: Any) -> None:
    """Write a checkpoint, or a model in full precision, as ONNX."""
    began = time.perf_counter()
    if no_components:
        say("--no-components is now called --no-pipeline: the old word goes with the next version")
        options["components"] = False
    report_made(_EXPORT.call(source, **options), began, as_json)


@click.command("export-gguf")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, help="File to write, named *.gguf.")
@_GGUF.option("overwrite", "Replace a file that is there.")
@verb
def export_gguf(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Write a checkpoint's weights as a GGUF file, which diffusers loads."""
    made = _GGUF.call(checkpoint, **options)
    print_result(as_json, made.to_json, made.as_text)


def _tensorrt(function: F) -> F:
    """The options that only builds with TensorRT have: keys of `qdeploy.engines.backend_options.BackendOptions`."""
    decorated: Any = function
    for option in (
        click.option(
            "--shapes", help="TensorRT: NAME:MIN,OPT,MAX;...  [default: from the graph and --batch]"
        ),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path),
            help="TensorRT: keeps timings of kernels between builds.",
        ),
        click.option("--workspace", type=float, help="TensorRT: GiB of scratch memory.  [default: all]"),
        click.option("--refit", is_flag=True, help="TensorRT: weights can be replaced later."),
        click.option("--weight-streaming", is_flag=True, help="TensorRT: weights need not fit on the GPU."),
        click.option("--hardware-compatible", is_flag=True, help="TensorRT: for every GPU from Ampere on."),
        click.option("--version-compatible", is_flag=True, help="TensorRT: for later versions of it."),
        click.option("--strip-plan", is_flag=True, help="TensorRT: weights stay outside of the plan."),
        click.option("--optimization-level", type=int, help="TensorRT: 0 to 5, how long to search.  [3]"),
        click.option("--gpu", help="TensorRT for RTX: cards to compile for, as sm89,rtx5090.  [this one's]"),
        click.option("--time-limit", type=float, help="TensorRT: minutes that the builder may run."),
        click.option("--memory-limit", type=float, help="TensorRT: GiB that the builder may hold."),
    )[::-1]:
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@click.command("build-engine")
@click.argument("onnx")
@_BUILD.option("output", "Folder to write.  [default: ONNX-engine in the working directory]")
@_BUILD.option("backend", "tensorrt, openvino, onnxruntime, ...: see `qdeploy doctor`.")
@_BUILD.option("precision", "What is not integer: f32, bf16 or f16.  [default: f32; optimized: bf16]")
@_BUILD.option("optimize_for", "latency: keep int8 only where it is measured to pay.")
@_BUILD.option("min_sqnr", "Least SQNR that --optimize-for may end with, in dB.")
@_BUILD.option("batch", "Batch size that is measured.")
@_BUILD.option("threads", "CPU threads.  [default: all]")
@click.option(
    "--pipeline/--no-pipeline",
    default=None,
    help="Also text encoders and autoencoders.  [default: where there are any]",
)
@click.option("--components", help="Precisions: vae=f32,text_encoder=bf16, vae=w8a8.  [default: 16 bits]")
@_BUILD.option("calibration", "For vae=w8a8: the set whose latents are decoded.")
@_BUILD.option("allow_inaccurate", "Keep an engine that is far from the model on its probe.")
@_BUILD.option("strict", "Refuse a pipeline some of whose components stay in torch.")
@click.option("--device", help="OpenVINO: CPU, GPU or NPU.  [default: CPU]")
@_tensorrt
@_BUILD.option("overwrite", "Replace another artifact at the output.")
@verb
def build_engine(onnx: str, components: str | None, as_json: bool, **options: Any) -> None:
    """Build an engine from an ONNX bundle, and measure it."""
    from qdeploy.engines.components import read_precisions

    began = time.perf_counter()
    built = _BUILD.call(onnx, components=read_precisions(components), **options)
    report_made(built, began, as_json, lambda engine: {"measured": engine.measured.to_json()}, _measured)


def _measured(engine: EngineFolder) -> str:
    """What the build measured, in a line."""
    found = engine.measured
    if found.ms is None or found.parity is None:
        return f"{found.size_mb:.1f} MB, not measured: {found.not_run}"
    samples = f"{engine.facts.batch} sample{'s' * (engine.facts.batch > 1)}"
    return (
        f"{found.ms.median:.3g} ms a call with {samples} (95 % within {found.ms.p95:.3g}), "
        f"{found.size_mb:.1f} MB, {found.int8_mac_share:.0%} of the multiplications in int8, "
        f"{found.parity.sqnr_db:.1f} dB from the simulation"
    )


@click.command()
@click.argument("artifact")
@click.argument("repository", metavar="OWNER/NAME")
@_PUSH.option("revision", "A branch of the repository.  [default: main]")
@_PUSH.option("private", "Make a new repository private.")
@_PUSH.option("message", "Of the commit.")
@verb
def push(artifact: str, repository: str, as_json: bool, **options: Any) -> None:
    """Upload an artifact to a repository of the Hugging Face Hub."""
    url = _PUSH.call(artifact, repository, **options)
    print_result(as_json, lambda: {"repository": repository, "url": url}, lambda: url)


@click.command()
@click.argument("artifact")
@_SIGN.option("key", "PEM file of an Ed25519 private key.", required=True)
@_SIGN.option("new_key", "Make the key first, and KEY.pub beside it.")
@verb
def sign(artifact: str, as_json: bool, **options: Any) -> None:
    """Sign an artifact, so that others can tell that it is yours and unchanged."""
    made = str(_SIGN.call(artifact, **options))
    print_result(as_json, lambda: {"signature": made}, lambda: made)


@click.command()
@click.argument("artifact")
@_SIGNED.option("keys", "PEM file of a public key. Repeatable.", "--key", required=True)
@verb
def verify(artifact: str, as_json: bool, **options: Any) -> None:
    """Say whether an artifact is as one of the keys' owners signed it."""
    found = _SIGNED.call(artifact, **options)
    print_result(
        as_json,
        lambda: {"key": str(found.key), "sha256": found.sha256},
        lambda: f"signed with {found.key} ({found.sha256[:12]})",
    )


@click.command()
@click.argument("engine")
@_PACKAGE.option("output", "Folder to write.", required=True)
@_PACKAGE.option("server", "triton, kserve, openvino-genai or ovms.", "--for", required=True)
@_PACKAGE.option("name", "Of the model in requests.  [default: of the engine's folder]")
@_PACKAGE.option("batch", "Most images that are sampled at once.")
@_PACKAGE.option("overwrite", "Replace an earlier package at the output.")
@verb
def package(engine: str, as_json: bool, **options: Any) -> None:
    """Write a folder that a model server loads, with the commands that start it."""
    made = _PACKAGE.call(engine, **options)
    print_result(as_json, made.to_json, made.as_text)


@click.command()
@click.argument("source", metavar="ONNX")
@_LINT.option("target", "Whose rules: see `qdeploy methods`.  [default: the bundle's, or tensorrt]")
@_LINT.option("engine", "Which TensorRT the rules are about: tensorrt or tensorrt-rtx.")
@click.option("--verify", is_flag=True, help="Also have TensorRT for RTX build the graph.")
@click.option("--gpu", default="sm89", show_default=True, help="For --verify: GPUs to compile for.")
@click.option("--all", "every", is_flag=True, help="Show every place, not one line for each rule.")
@_LINT.option("tensorrt", "TensorRT's version.")
@_LINT.option("compute_capability", "The GPU's, as 8.9.")
@_LINT.option("shapes", "Smallest, optimal, largest: sample:1x4x64x64,2x4x64x64,8x4x64x64;...")
@click.option("--fix", is_flag=True, help="Mend what can be without changing the function; needs -o.")
@click.option("-o", "--output", metavar="PATH", help="ONNX file for the mended graph.")
@verb
def lint(
    source: str,
    fix: bool,
    output: str | None,
    verify: bool,
    gpu: str,
    every: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what an engine would reject or run slowly, before a build; exit code 3 if it would reject."""
    if fix != (output is not None):
        raise UsageError("--fix and -o belong together: the mended graph is written to another file")
    result = _LINT.call(source, fix=output, **options)
    ran = _VERIFY.call(output or source, gpu=gpu, shapes=options["shapes"]) if verify else None
    verified = [] if ran is None else ran.lines()
    print_result(
        as_json,
        lambda: result.to_json() | ({} if ran is None else {"verified": asdict(ran)}),
        lambda: "\n".join([result.table(every), *verified]),
    )
    if not result.passed:
        raise CheckFailed(f"{source}: {result.counts['E']} findings that an engine rejects")
    if ran is not None and not ran.built:
        raise CheckFailed(f"{source}: {ran.engine} refuses it")


@click.command()
@_DOCTOR.option("require", "A backend that has to be usable: exit code 4 with the reason if it is not.")
@verb
def doctor(require: str | None, as_json: bool) -> None:
    """What this machine can build and run, and how to get what is missing."""
    result = _DOCTOR.call(require=require)
    print_result(as_json, result.to_json, result.as_text)


@click.command()
@_SELFTEST.option("backend", "tensorrt, openvino, onnxruntime, ...: see `qdeploy doctor`.")
@_SELFTEST.option("precision", "What is not quantized: f32, bf16 or f16.")
@_SELFTEST.option("formats", "fp32, int8, int4, fp8.  [default: all]", "--format")
@click.option("-o", "--output", metavar="PATH", help="File to write the report into, as JSON.")
@verb
def selftest(output: str | None, as_json: bool, **options: Any) -> None:
    """Build and run tiny graphs on a backend, and compare with ONNX Runtime: one report to send."""
    result = _SELFTEST.call(**options)
    if output is not None:
        from qdeploy.store.files import explained_os_errors, write_json

        with explained_os_errors(Path(output)):
            write_json(Path(output), result.to_json())
    print_result(as_json, result.to_json, result.table)
    if not result.passed:
        raise CheckFailed(result.failures)
