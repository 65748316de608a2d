"""An ONNX graph in, a plan out, with what a runtime has to know of it in ``plan.json`` beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.engines.tensorrt.graph import Graph, read_graph
from qdeploy.engines.tensorrt.half import halve
from qdeploy.engines.tensorrt.inspector import read_layers, report
from qdeploy.engines.tensorrt.logger import create, last_errors, logger_of
from qdeploy.engines.tensorrt.memory import estimate, warn_if_tight
from qdeploy.engines.tensorrt.options import Options, check_machine, check_options
from qdeploy.engines.tensorrt.parser import check_network, parse
from qdeploy.engines.tensorrt.plan import ENGINE, LAYERS, REFIT, SIDECAR, open_plan, require_trust
from qdeploy.engines.tensorrt.profiles import (
    Profile,
    add_profiles,
    check_profiles,
    default_profile,
    describe,
    parse_shapes,
)
from qdeploy.engines.tensorrt.progress import make_monitor
from qdeploy.engines.tensorrt.timing_cache import cache_file, load_cache, save_cache
from qdeploy.engines.tensorrt.versions import creation_flags, first, load_tensorrt, member
from qdeploy.export.macs import meant_int8
from qdeploy.store.files import write_atomically, write_json
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.gpu import Gpu, require_gpu
from qdeploy.system.hashing import sha256_file

# Wishes that are flags, by the name of the member of ``trt.BuilderFlag``.
FLAGS = {
    "refit": "REFIT",
    "weight_streaming": "WEIGHT_STREAMING",
    "version_compatible": "VERSION_COMPATIBLE",
    "strip_plan": "STRIP_PLAN",
}


def build(onnx_path: Path, folder: Path, **wishes: Any) -> None:
    """Write the plan of a graph, ``plan.json`` and ``layers.json``.

    Args:
        onnx_path: the graph.
        folder: where they go.
        wishes: fields of `Options`.

    Raises:
        UsageError: impossible options or shapes.
        CapabilityError: no GPU, no TensorRT, or one that lacks what is asked for.
        InvalidInputError: TensorRT refuses the graph; the message has its reasons.
    """
    options = Options(**wishes)
    check_options(options)
    if options.version_compatible:
        require_trust()  # rather now than after the build
    graph = read_graph(onnx_path)
    profiles = profiles_of(graph, options)
    gpu = require_gpu()
    check_machine(options, graph, gpu)
    needed = estimate(onnx_path, graph, profiles, options)
    warn_if_tight(needed, gpu, options)
    trt = load_tensorrt()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = onnx_path
        if options.precision != "f32":
            path = Path(scratch) / "model.onnx"
            halve(onnx_path, path, options.precision)
        plan = build_plan(trt, path, graph, profiles, options, gpu)
        write_atomically(folder / ENGINE, lambda partial: _write(partial, plan))
        if options.strip_plan:
            _keep_weights(path, folder)
    sidecar = {
        "plan_sha256": sha256_file(folder / ENGINE),
        "plan_bytes": (folder / ENGINE).stat().st_size,
        "onnx_sha256": sha256_file(onnx_path),
        "tensorrt": str(trt.__version__),
        "gpu": gpu.to_json(),
        "options": options.facts(),
        "profiles": describe(profiles),
        "estimated_bytes": needed,
        "timing_cache": cache_file(Path(), str(trt.__version__), gpu).name if options.timing_cache else None,
    }
    write_json(folder / SIDECAR, sidecar)
    _inspect(trt, folder, gpu, meant_int8(onnx_path))


def profiles_of(graph: Graph, options: Options) -> list[Profile]:
    """The profiles that were asked for, or the default, checked; none for a graph of fixed shapes."""
    if options.shapes is None:
        default = default_profile(graph.inputs, options.batch)
        profiles: list[Profile] = [default] if default else []
    else:
        profiles = list(parse_shapes(options.shapes))
    check_profiles(profiles, graph.inputs)
    return profiles


def build_plan(
    trt: Any, path: Path, graph: Graph, profiles: Sequence[Profile], options: Options, gpu: Gpu
) -> Any:
    """Have TensorRT build.

    Args:
        trt: the module.
        path: the graph in the types to compute in.
        graph: its description.
        profiles: checked profiles.
        options: checked options.
        gpu: the GPU, for the name of the timing cache.

    Returns:
        The plan as an ``IHostMemory``, a buffer.

    Raises:
        CapabilityError: this TensorRT lacks an option.
        InvalidInputError: TensorRT refuses the graph.
    """
    logger = logger_of(trt)
    logger.messages.clear()
    builder = create(trt.Builder, logger, logger=logger)
    network = create(builder.create_network, creation_flags(trt), logger=logger)
    config = create(builder.create_builder_config, logger=logger)
    # The network's weights point into the parser's memory: it lives until the build is done.
    parser = parse(trt, network, path, logger)
    check_network(network, graph)
    configure(trt, config, options)
    add_profiles(builder, config, network, profiles)
    cache = None if options.timing_cache is None else cache_file(options.timing_cache, trt.__version__, gpu)
    if cache is not None:
        load_cache(config, cache)
    monitor = make_monitor(trt)
    if monitor is not None:
        config.progress_monitor = monitor
    try:
        plan = builder.build_serialized_network(network, config)
    finally:
        if monitor is not None:
            monitor.close()
    del parser
    if plan is None:
        raise InvalidInputError(f"TensorRT cannot build {path.name}: {last_errors(logger)}")
    if cache is not None:
        save_cache(config, cache)
    return plan


def configure(trt: Any, config: Any, options: Options) -> None:
    """Set everything that is not left to TensorRT's defaults.

    Raises:
        CapabilityError: this version lacks an option that was asked for.
    """
    # Without details the inspector tells names only, and nobody can say what runs in int8.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # CUDA graphs and auxiliary streams do not go together everywhere.
    config.max_aux_streams = 0
    config.set_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for wish, flag in FLAGS.items():
        if getattr(options, wish):
            config.set_flag(member(trt, "BuilderFlag", flag))
    if options.hardware_compatible:
        config.hardware_compatibility_level = member(trt, "HardwareCompatibilityLevel", "AMPERE_PLUS")


def sizes_of(trt: Any, engine: Any) -> dict[str, int]:
    """Bytes that an engine needs on the GPU, as far as this version tells: scratch and activations, weights."""
    sizes = {"activations": first(engine, "device_memory_size_v2", "device_memory_size")}
    if hasattr(engine, "get_engine_stat"):
        sizes["weights"] = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
    return {name: int(size) for name, size in sizes.items() if size is not None}


def _write(path: Path, plan: Any) -> None:
    with path.open("wb") as stream:
        stream.write(memoryview(plan))


def _keep_weights(path: Path, folder: Path) -> None:
    """Lay the graph beside a plan without weights: it is where they are taken from."""
    (folder / REFIT).mkdir(exist_ok=True)
    for name in (path.name, f"{path.name}_data"):
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / REFIT / name)


def _inspect(trt: Any, folder: Path, gpu: Gpu, planned: set[str]) -> None:
    """Open the plan once, to see that it opens, and keep what it says of its layers."""
    plan = open_plan(trt, folder, gpu)
    try:
        layers = read_layers(trt, plan.engine)
        sizes = sizes_of(trt, plan.engine)
    finally:
        plan.close()
    write_json(folder / LAYERS, {"layers": layers, "report": report(layers, planned), "bytes": sizes})
