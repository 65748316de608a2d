"""TensorRT, INT8 beside FP16 on the same GPU in one run: milliseconds per step, images per second.

    python benchmarks/tensorrt_sampling.py MODEL ONNX --batch 1 --batch 4 --steps 50 -o runs/tensorrt

MODEL is the full-precision pipeline, ONNX the quantized bundle that was exported of it. Both engines are built for
the same batches; everything that is not int8 is computed in f16 in both. A step is timed by CUDA events with its
tensors on the GPU, engines taking turns; a pipeline is timed from the call to the last image, text encoder and
decoder included. Clocks, temperature, power and memory stand beside every number. Without a GPU it ends with code 4.
``--backend tensorrt --backend tensorrt-rtx`` measures both TensorRTs, one after the other, in one table.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from qdeploy.store.artifact import Artifact, Bundle, open_artifact
from qdeploy.system.errors import CapabilityError, QDeployError

if TYPE_CHECKING:
    from qdeploy.engines.registry import Backend

PRECISION = "f16"


def build(
    source: Artifact, folder: Path, name: str, backend: str, batches: tuple[int, ...], level: int | None
) -> Artifact:
    """An engine whose profile ends at the largest batch, doubled for guidance."""
    from qdeploy.engines.build import build_engine

    timings = folder / "timings" if backend == "tensorrt" else None  # the other one times nothing in a build
    return build_engine(
        source,
        folder / name,
        backend=backend,
        precision=PRECISION,
        batch=max(batches),
        timing_cache=timings,
        optimization_level=level,
    )


def steps(
    engines: dict[str, Artifact], batches: tuple[int, ...], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Milliseconds of a denoiser call by engine and batch size."""
    from contextlib import ExitStack

    from qdeploy.engines.build import load_engine
    from qdeploy.engines.measure import int8_shares, repeat_rows
    from qdeploy.engines.tensorrt.smi import gpu_state
    from qdeploy.engines.timing import quantile, take_turns
    from qdeploy.store.probe import read_probe

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        loaded = {name: stack.enter_context(load_engine(engine)) for name, engine in engines.items()}
        probe = read_probe(next(iter(engines.values())).path)[0]
        for batch in batches:
            inputs = repeat_rows(probe, batch)
            before = gpu_state()
            turns = take_turns(loaded, dict.fromkeys(loaded, inputs), rounds, seconds, f"batch {batch}")
            state = {"before": before, "after": gpu_state()}
            for name, engine in loaded.items():
                times = [ms for turn in turns[name] for ms in turn]
                rows.append(
                    {
                        "engine": name,
                        "batch": batch,
                        "ms": {"median": round(median(times), 4), "p95": round(quantile(times, 0.95), 4)},
                        "calls": len(times),
                        "int8_mac_share": int8_shares(engine, inputs)["int8_mac_share"],
                        "gpu": state,
                    }
                )
    return rows


def whole(
    make: Callable[[], Any], seeds: int, batch: int, length: int, prompts: list[str] | None
) -> dict[str, Any]:
    """Images per second of a pipeline, the second of two runs."""
    import torch

    from qdeploy.engines.tensorrt.smi import gpu_state
    from qdeploy.model.pipeline import generate

    pipeline = make()
    words = [prompts[seed % len(prompts)] for seed in range(seeds)] if prompts else None
    took = 0.0
    torch.cuda.reset_peak_memory_stats()
    before = gpu_state()
    for _ in range(2):  # the first one loads kernels and records graphs
        torch.cuda.synchronize()
        began = time.perf_counter()
        for start in range(0, seeds, batch):
            part = range(start, min(start + batch, seeds))
            generate(pipeline, part, length, words[start : start + batch] if words else None)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    return {
        "batch": batch,
        "images": seeds,
        "steps": length,
        "seconds": round(took, 3),
        "images_per_second": round(seeds / took, 3),
        "torch_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1),
        "gpu": {"before": before, "after": gpu_state()},
    }


def run(model: Path, onnx: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """All of it, also written to ``results.json``."""
    backends = [ready(name) for name in options["backend"]]  # before anything that takes time
    from qdeploy.engines.build import load_engine
    from qdeploy.evaluate.baselines import baseline_bundle
    from qdeploy.model.folder import open_model
    from qdeploy.model.prompts import read_prompts
    from qdeploy.store.files import write_json
    from qdeploy.system.machine import machine

    batches = options["batch"]
    pipeline_of = open_model(model)
    sources = {"fp16": baseline_bundle(pipeline_of), "int8": open_artifact(onnx, Bundle)}
    built = {
        engine_name(backend.name, name): build(
            source, output, engine_name(backend.name, name), backend.name, batches, options["level"]
        )
        for backend in backends
        for name, source in sources.items()
    }
    rows = steps(built, batches, options["rounds"], options["seconds"])
    prompts = read_prompts(options["prompts"]) if options["prompts"] else None
    images = []
    for name, engine in built.items():
        with load_engine(engine) as loaded:
            for batch in batches:

                def make(denoiser: Any = loaded) -> Any:
                    return pipeline_of.pipeline(denoiser.as_denoiser()).to("cuda")

                images.append(
                    {"engine": name} | whole(make, options["images"], batch, options["steps"], prompts)
                )
    result = {
        "versions": {backend.name: backend.version() for backend in backends},
        "machine": machine("cuda"),
        "precision": PRECISION,
        "steps": rows,
        "pipelines": images,
        "plans_mb": {name: engine.measured.size_mb for name, engine in built.items()},
    }
    write_json(output / "results.json", result)
    return result


def ready(name: str) -> Backend:
    """A backend that runs on this machine.

    Raises:
        CapabilityError: it does not.
    """
    from qdeploy.engines.registry import find_backend

    backend = find_backend(name)
    if reason := backend.why_not_here():
        raise CapabilityError(reason)
    return backend


def engine_name(backend: str, precision: str) -> str:
    """What an engine is called in the table, and its folder."""
    return precision if backend == "tensorrt" else f"{backend}-{precision}"


def table(result: dict[str, Any]) -> str:
    """The numbers for a page, in Markdown."""
    from qdeploy.system.tables import Table

    by = {(row["engine"], row["batch"]): row for row in result["steps"]}
    speed = {(row["engine"], row["batch"]): row for row in result["pipelines"]}
    rows = []
    for (engine, batch), row in by.items():
        rival = by[engine.replace("int8", "fp16"), batch]["ms"]["median"]
        gpu = row["gpu"]["after"]
        rows.append(
            [
                engine,
                str(batch),
                f"{row['ms']['median']:.3f}",
                f"{row['ms']['p95']:.3f}",
                f"{rival / row['ms']['median']:.2f}x",
                f"{speed[engine, batch]['images_per_second']:.2f}",
                f"{row['int8_mac_share']:.0%}",
                f"{gpu['sm_mhz']:.0f}" if gpu["sm_mhz"] else "",
                f"{gpu['used_mib']:.0f}" if gpu["used_mib"] else "",
            ]
        )
    columns = ["engine", "batch", "ms per step", "p95", "vs fp16", "images/s", "int8 MACs", "SM MHz", "MiB"]
    return Table(columns, rows).markdown()


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("runs/tensorrt"), show_default=True
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    multiple=True,
    default=("tensorrt",),
    show_default=True,
    help="Repeatable.",
)
@click.option("--batch", type=int, multiple=True, default=(1, 4), show_default=True, help="Repeatable.")
@click.option("--images", type=int, default=16, show_default=True)
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--rounds", type=int, default=50, show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Per batch size.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one prompt per line.")
@click.option("--level", type=int, help="TensorRT's optimization level.")
def main(model: Path, onnx: Path, output: Path, **options: Any) -> None:
    """Measure."""
    try:
        result = run(model, onnx, output, options)
    except QDeployError as error:
        print(f"tensorrt_sampling: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"results": str(output / "results.json")}))
    print(table(result))


if __name__ == "__main__":
    main()
