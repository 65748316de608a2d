"""Build a plan from an ONNX graph, and describe it in ``plan.json`` in the same folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines.tensorrt.adapted import adapted
from qdeploy.engines.tensorrt.child import Built, build_in_child
from qdeploy.engines.tensorrt.flavour import TENSORRT, Flavour
from qdeploy.engines.tensorrt.gpu_targets import check_products, choose_targets, set_targets
from qdeploy.engines.tensorrt.graph import Graph, read_graph
from qdeploy.engines.tensorrt.inspector import read_layers, report, wide_results
from qdeploy.engines.tensorrt.layer_log import parse_layer_log
from qdeploy.engines.tensorrt.logger import create, last_errors, logger_of
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
    tuned_batch,
)
from qdeploy.engines.tensorrt.progress import make_monitor
from qdeploy.engines.tensorrt.timing_cache import cache_file, load_cache, save_cache
from qdeploy.engines.tensorrt.traffic import bytes_moved
from qdeploy.engines.tensorrt.versions import creation_flags, first, load_tensorrt, member, version_of
from qdeploy.engines.tensorrt.worker import BuildRequest
from qdeploy.store.files import write_atomically, write_json
from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.gpu import Gpu, require_gpu
from qdeploy.system.hashing import sha256_file

if TYPE_CHECKING:
    from qdeploy.export.products import Product

# Wishes that are flags, by the name of the member of ``trt.BuilderFlag``.
FLAGS = {
    "refit": "REFIT",
    "weight_streaming": "WEIGHT_STREAMING",
    "version_compatible": "VERSION_COMPATIBLE",
    "strip_plan": "STRIP_PLAN",
}


def build(
    onnx_path: Path, folder: Path, *, flavour: Flavour = TENSORRT, **build_options: Any
) -> dict[str, Any]:
    """Write the plan of a graph, ``plan.json`` and ``layers.json``.

    Args:
        onnx_path: the graph.
        folder: where they go.
        flavour: which TensorRT builds.
        build_options: fields of `Options`.

    Returns:
        What the build took: ``seconds``, and ``peak_bytes`` of memory where the system tells.

    Raises:
        UsageError: impossible options or shapes, or an unknown GPU.
        CapabilityError: no GPU where one is needed, no TensorRT, one that lacks what is asked for, or a limit is
            reached.
        InvalidInputError: TensorRT refuses the graph, or crashes on it; the message has its reasons.
    """
    from qdeploy.engines.tensorrt.half import halve
    from qdeploy.engines.tensorrt.memory import estimate, warn_if_tight
    from qdeploy.export.products import products

    options = Options(**build_options)
    check_options(options)
    if options.version_compatible:
        require_trust()  # rather now than after the build
    graph = read_graph(onnx_path)
    profiles = profiles_of(graph, options)
    gpu = gpu_of(flavour)
    targets = choose_targets(flavour, options.gpu, graph, gpu)
    if gpu is not None and not targets:
        check_machine(options, graph, gpu)
    needed = estimate(onnx_path, graph, profiles, options)
    if gpu is not None:
        warn_if_tight(needed, gpu, options)
    trt = load_tensorrt(flavour)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = adapted(flavour, onnx_path, Path(scratch), options.precision)
        if options.precision != "f32":
            half = Path(scratch) / "model.onnx"
            halve(path, half, options.precision, flavour.wide_scales)
            path = half
        found = products(path)
        check_products(flavour, version_of(trt), targets, found)
        request = BuildRequest(flavour.backend, onnx_path, path, describe(profiles), options, targets, gpu)
        work = Path(scratch) / "build"
        work.mkdir()
        built = build_in_child(request, work)
        write_atomically(folder / ENGINE, lambda partial: _copy(built.plan, partial))
        if options.strip_plan:
            _keep_weights(path, folder)
    version = str(trt.__version__)
    cache = gpu if options.timing_cache else None
    sidecar = {
        "plan_sha256": sha256_file(folder / ENGINE),
        "plan_bytes": (folder / ENGINE).stat().st_size,
        "onnx_sha256": sha256_file(onnx_path),
        "backend": flavour.backend,
        "tensorrt": version,
        "gpu": None if gpu is None else gpu.to_json(),
        "targets": list(targets),
        "options": options.facts(),
        "profiles": describe(profiles),
        "estimated_bytes": needed,
        "timing_cache": None if cache is None else cache_file(Path(), version, cache).name,
    }
    write_json(folder / SIDECAR, sidecar)
    _inspect(trt, folder, gpu, flavour, built, found, profiles, targets)
    return {"seconds": built.seconds, "peak_bytes": built.peak_bytes}


def gpu_of(flavour: Flavour) -> Gpu | None:
    """The GPU of this machine; None where there is none and the library builds without.

    Raises:
        CapabilityError: there is none, and the library needs it to build.
    """
    if not flavour.targets:
        return require_gpu()
    try:
        gpu = require_gpu(packages=flavour.cuda)
    except CapabilityError:
        return None
    return gpu if gpu.sm in flavour.targets else None


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
    trt: Any,
    path: Path,
    graph: Graph,
    profiles: Sequence[Profile],
    options: Options,
    gpu: Gpu | None,
    targets: Sequence[int] = (),
) -> Any:
    """Have TensorRT build.

    Args:
        trt: the module.
        path: the graph in the types to compute in.
        graph: its description.
        profiles: checked profiles.
        options: checked options.
        gpu: the GPU, for the name of the timing cache.
        targets: compute capabilities to compile for; the GPU's own if empty.

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
    set_targets(trt, config, targets)
    add_profiles(builder, config, network, profiles)
    cache = None
    if options.timing_cache is not None and gpu is not None:
        cache = cache_file(options.timing_cache, trt.__version__, gpu)
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
    for name, flag in FLAGS.items():
        if getattr(options, name):
            config.set_flag(member(trt, "BuilderFlag", flag))
    if options.hardware_compatible:
        config.hardware_compatibility_level = member(trt, "HardwareCompatibilityLevel", "AMPERE_PLUS")


def sizes_of(trt: Any, engine: Any) -> dict[str, int]:
    """Bytes that an engine needs on the GPU, as far as this version tells: scratch and activations, weights."""
    sizes = {"activations": first(engine, "device_memory_size_v2", "device_memory_size")}
    if hasattr(engine, "get_engine_stat"):
        sizes["weights"] = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
    return {name: int(size) for name, size in sizes.items() if size is not None}


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _keep_weights(path: Path, folder: Path) -> None:
    """Copy the graph next to a plan without weights, which are read from it."""
    (folder / REFIT).mkdir(exist_ok=True)
    for name in (path.name, f"{path.name}_data"):
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / REFIT / name)


def _inspect(
    trt: Any,
    folder: Path,
    gpu: Gpu | None,
    flavour: Flavour,
    built: Built,
    found: Sequence[Product],
    profiles: Sequence[Profile],
    targets: Sequence[int],
) -> None:
    """Keep what the plan says of its layers: opened where a GPU can, else as the builder logged them."""
    sizes: dict[str, int] = {}
    if gpu is not None and (not targets or gpu.sm in targets):
        plan = open_plan(trt, folder, gpu, flavour)
        try:
            layers = read_layers(trt, plan.engine)
            sizes = sizes_of(trt, plan.engine)
        finally:
            plan.close()
        source = "engine inspector"
    elif built.layers is not None:
        source = "build log"
        layers = parse_layer_log(built.layers)
    else:
        raise InvalidInputError(f"the build of {folder / ENGINE} logged no layers: report this version")
    planned = {product.name: product.kind for product in found if product.kind}
    per_channel = {product.name for product in found if product.per_channel}
    said = {
        "source": source,
        "layers": layers,
        "report": report(layers, planned) | {"float32_results": wide_results(layers, planned, per_channel)},
        "moved": bytes_moved(layers, tuned_batch(profiles)),
        "bytes": sizes,
    }
    write_json(folder / LAYERS, said)
