"""The verb ``build-engine``: an ONNX bundle in, an engine with its measurements out."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.engines.base import DYNAMIC, Engine
from qdeploy.engines.components import build_components, plan_components
from qdeploy.engines.int8_decoder import W8A8
from qdeploy.engines.int8_sums import sums_of
from qdeploy.engines.measure_build import measure_engine, measure_plan
from qdeploy.engines.placement.place import Placer
from qdeploy.engines.registry import PRECISIONS, Backend, backends, find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.export.graph.external import check_external, plain_graph
from qdeploy.export.macs import graph_macs, meant_int8
from qdeploy.model.card import write_card
from qdeploy.store.artifact import Artifact, Bundle, Checkpoint, EngineFolder, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.facts import EngineFacts, PipelineFacts
from qdeploy.store.hub import local_artifact
from qdeploy.store.paths import default_output
from qdeploy.store.work import full_disk_named
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.machine import (
    BF16_INSTRUCTIONS,
    NARROW,
    cpu_features,
    cpu_model,
    has_bf16,
    has_int8,
    int8_sums_saturate,
)
from qdeploy.system.progress import say
from qdeploy.system.suggest import unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qdeploy.engines.backend_options import BackendOptions


def build_engine(
    bundle: str | Path | Artifact,
    output: str | Path | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    optimize_for: str | None = None,
    min_sqnr: float | None = None,
    pipeline: bool | None = None,
    components: Mapping[str, str] | None = None,
    calibration: str | Path | Artifact | None = None,
    strict: bool = False,
    allow_inaccurate: bool = False,
    overwrite: bool = False,
    **build_options: Unpack[BackendOptions],
) -> EngineFolder:
    """Build the engine of an ONNX bundle, and measure it.

    Args:
        bundle: an artifact of kind ``onnx``.
        output: the engine's folder; ``ONNX-engine`` in the working directory by default.
        backend: name of a backend, or ``auto`` for the fastest that is installed.
        precision: what everything that is not int8 is computed in, ``f32``, ``bf16`` or, on GPUs, ``f16``. By
            default that of the backend, mostly ``f32``; with ``optimize_for``, 16 bits where the processor has
            them.
        batch: number of samples per call that the speed is measured with; the engine takes any number.
        threads: number of threads that the engine runs on; the runtime's own choice if None.
        optimize_for: ``latency`` measures which quantizers pay on this machine, and computes the layers behind
            the others in ``precision``; None keeps them all.
        min_sqnr: with ``optimize_for``, the least median SQNR to full precision on the probe, in dB.
        pipeline: also build the pipeline's text encoders and autoencoders, so that the folder is a whole pipeline
            (`qdeploy.sampling.pipeline_folder`); by default wherever bundle and backend allow it.
        components: precision of each of these, such as ``{"vae": "f32"}``; 16 bits by default. A
            decoder at ``w8a8`` is quantized (`qdeploy.engines.int8_decoder`).
        calibration: the calibration set whose latents a decoder at ``w8a8`` is calibrated on.
        strict: refuse a pipeline some of whose components would stay in torch.
        allow_inaccurate: keep an engine that is below the floors of `qdeploy.engines.floor` on its probe.
        overwrite: replace another artifact at ``output``.
        build_options: those that only some backends have, see `BackendOptions`; None or False leaves one out.

    Returns:
        An artifact of kind ``engine``, in the layout that the runtime's own diffusers pipelines open.

    Raises:
        UsageError: an unknown backend or precision, an impossible number, an option of another backend, no set for
            a decoder at ``w8a8``.
        CapabilityError: the backend is not installed or has no kernels for a format of the bundle, the machine
            lacks bf16, or the bundle is a simulation.
        InvalidInputError: the bundle is damaged, or holds what the backend cannot run.
        CheckFailed: no placement reaches ``min_sqnr``, or the engine is below the floors.
    """
    if batch < 1 or (threads is not None and threads < 1):
        raise UsageError(f"batch and threads must be at least 1, not {batch if batch < 1 else threads}")
    source = open_artifact(bundle, Bundle, Checkpoint)
    if reasons := source.facts.simulated:
        raise CapabilityError(f"{source.path} is a simulation that no engine can run: {'; '.join(reasons)}")
    if isinstance(source, Checkpoint):
        raise InvalidInputError(f"{source.path} is a checkpoint: export it first, with `qdeploy export`")
    chosen = find_backend(backend, (source.facts.weights, source.facts.activations))
    _check_goal(chosen, optimize_for, min_sqnr)
    if precision is None:
        precision = chosen.default_precision
        if optimize_for and "bf16" in chosen.precisions and has_bf16():
            precision = "bf16"
    check_precision(chosen, precision)
    own = {name: value for name, value in build_options.items() if value is not None and value is not False}
    _check_build_options(chosen, own)
    if source.facts.sizes is not None and not chosen.any_size:
        raise CapabilityError(
            f"{chosen.name} builds engines of one size: export {source.path} without --sizes"
        )
    _check_dialect(chosen, source)
    rest = plan_components(chosen, source, pipeline, components, strict, calibration)
    latents = _latents_for(source, rest, calibration)
    quantized = source.facts.activations not in ("none", DYNAMIC)
    narrow = quantized and chosen.narrow_sums and int8_sums_saturate()
    if source.facts.activations == DYNAMIC and chosen.name == "openvino" and int8_sums_saturate():
        say(
            "this processor has no VNNI: OpenVINO leaves activations in float here, nearer to full precision than "
            "the simulation and no faster"
        )
    options = {
        "backend": chosen.name,
        "backend_version": chosen.version(),
        "engine_precision": precision,
        "batch": batch,
        "threads": threads,
        **({"int8_sums": NARROW} if narrow else {}),
        **({"optimize_for": optimize_for, "min_sqnr": min_sqnr} if optimize_for else {}),
        **{name: value for name, value in own.items() if _shapes_the_engine(chosen, name, value)},
    }
    asked = options | ({"pipeline": rest.to_json()} if rest else {})
    place = Path(output) if output else default_output(source.path, "engine")
    made_from = {"onnx": source.sha256, **source.made_from}
    if latents is not None:
        made_from["calibration"] = latents.sha256
    draft = Draft(place, EngineFolder, made_from, source.recipe, source.seed, asked, overwrite, source.size())
    if done := draft.finished():
        return done
    facts = EngineFacts(**source.facts.handed_on(), **_known(options), pipeline=rest)
    if chosen.device == "cpu":
        say(f"this processor: {cpu_model()}, with {', '.join(cpu_features()) or 'features unknown'}")
    if chosen.device == "cpu" and quantized and not has_int8():
        say("this processor has neither VNNI nor AMX: int8 gains less here than on one that has")
    with draft:
        say(f"building a {chosen.name} engine of {source.path.name}")
        graph = source.graph
        folder = f"{source.component}/"
        check_external(graph, [name.removeprefix(folder) for name in source.files if name.startswith(folder)])
        graph = plain_graph(graph, draft.work / "graphs" / source.component)
        searched = None
        if optimize_for:
            placement = Placer(chosen, source, graph, draft, facts).search(min_sqnr)
            graph, searched = placement.graph, placement.measured
            facts = replace(facts, quantizers_left_out=list(placement.floats))
        if quantized and chosen.narrow_sums:
            facts = replace(facts, int8_sums=sums_of(graph))
        took = _convert(chosen, source, graph, draft, facts, own)
        if rest:
            build_components(chosen, source, draft, rest, latents)
        write_card(draft, facts)
        if reason := chosen.why_not_here():
            say(f"the engine is built and not measured: {reason}")
            measured = measure_plan(draft, facts, reason)
        else:
            measured = measure_engine(chosen, source, draft, facts, allow_inaccurate)
        measured = replace(measured, placement=searched, build=dict(took) if took else None)
        return draft.finish(facts, measured, source.manifest.notes)


def _latents_for(
    source: Bundle, rest: PipelineFacts | None, calibration: str | Path | Artifact | None
) -> CalibrationSet | None:
    """The set that a decoder at W8A8 is calibrated on, if there is such a decoder."""
    if rest is None or W8A8 not in (rest.precision or {}).values():
        if calibration is not None:
            raise UsageError(
                "--calibration serves --components vae=w8a8, and nothing else is calibrated here"
            )
        return None
    data = CalibrationSet.open(calibration.path if isinstance(calibration, Artifact) else str(calibration))
    if source.made_from.get("calibration", data.sha256) != data.sha256:
        raise InvalidInputError(
            f"{source.path} was calibrated on another set than {data.artifact.path}: name that one"
        )
    return data


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a build as facts: those that have no fact of their own go under ``options``."""
    own = {name: value for name, value in options.items() if name in EngineFacts.__struct_fields__}
    foreign = {name: value for name, value in options.items() if name not in own}
    return own | ({"options": foreign} if foreign else {})


def load_engine(path: str | Path | Artifact, *, threads: int | None = None) -> Engine:
    """Open an engine that `build_engine` made; its files are verified first.

    Args:
        path: the engine's folder, or its id on the Hub; or the artifact, opened and so verified before.
        threads: number of threads; that of the build if None.

    Raises:
        InvalidInputError: it is no engine, or damaged.
        CapabilityError: its runtime is not installed, or this machine cannot run it.
    """
    artifact = path if isinstance(path, EngineFolder) else open_artifact(local_artifact(path), EngineFolder)
    facts = artifact.facts
    return find_backend(facts.backend).load(EngineSpec.of(artifact), threads or facts.threads)


def _check_dialect(backend: Backend, bundle: Bundle) -> None:
    """Refuse a quantized bundle of a target whose Q/DQ the backend cannot fuse."""
    facts = bundle.facts
    quantized = {facts.weights, facts.activations} != {"none"}
    if quantized and facts.target and backend.dialects and facts.target not in backend.dialects:
        raise CapabilityError(
            f"{bundle.path} was made for the target {facts.target}, and {backend.name} reads "
            f"{' and '.join(sorted(backend.dialects))}: calibrate for the target {max(backend.dialects)}"
        )


def check_precision(backend: Backend, precision: str) -> None:
    """Make sure that a backend computes in a precision on this machine.

    Raises:
        UsageError: there is no such precision.
        CapabilityError: the backend or the processor lacks it.
    """
    if precision not in PRECISIONS:
        raise UsageError(unknown("engine precision", precision, PRECISIONS))
    if precision not in backend.precisions:
        able = " or ".join(backend.precisions)
        raise CapabilityError(f"{backend.name} computes in {able} only, not in {precision}")
    if precision == "bf16" and backend.device == "cpu" and not has_bf16():
        needed = " or ".join(BF16_INSTRUCTIONS)
        raise CapabilityError(f"this processor has no bf16 instructions ({needed}): build with f32")


def _check_goal(backend: Backend, optimize_for: str | None, min_sqnr: float | None) -> None:
    if optimize_for is None:
        if min_sqnr is not None:
            raise UsageError("--min-sqnr limits what --optimize-for may do: set both, or neither")
        return
    if optimize_for != "latency":
        raise UsageError(f"an engine can be optimized for latency, not for {optimize_for!r}")
    if min_sqnr is not None and not isfinite(min_sqnr):
        raise UsageError(f"the least SQNR is a number of dB, not {min_sqnr}")
    if backend.device != "cpu":
        raise UsageError(
            f"--optimize-for is for CPUs: {backend.name} chooses between int8 and 16 bits itself when it builds"
        )


def _check_build_options(backend: Backend, build_options: dict[str, Any]) -> None:
    known = {name for other in backends().values() for name in other.build_options}
    for name in build_options.keys() - set(backend.build_options):
        if name not in known:
            raise TypeError(f"build_engine takes no {name!r}")
        able = " and ".join(other.name for other in backends().values() if name in other.build_options)
        raise UsageError(f"--{name.replace('_', '-')} is an option of {able}, not of {backend.name}")


def _convert(
    backend: Backend,
    source: Bundle,
    graph: Path,
    draft: Draft[EngineFolder],
    facts: EngineFacts,
    build_options: dict[str, Any],
) -> Mapping[str, Any] | None:
    """Write the runtime's files, copy what is still needed of the bundle, and store the MACs of all layers.

    Returns:
        What the runtime's build took, where the backend measures it.
    """
    if backend.build_options:
        build_options = build_options | {"precision": facts.engine_precision, "batch": facts.batch}
    with full_disk_named(draft.content):
        took = backend.build(graph, draft.content / facts.component, **build_options)
    for name in source.files:
        if not name.endswith((".onnx", ".onnx_data")):
            draft.copy(source.file(name), name)
    inputs = source.probe().inputs
    shapes = {name: list(x.shape) if name == "timestep" else [1, *x.shape[1:]] for name, x in inputs.items()}
    if "timestep" in shapes:
        shapes["timestep"] = []
    draft.json("macs.json", {"macs": graph_macs(graph, shapes), "meant_int8": sorted(meant_int8(graph))})
    return took


def _shapes_the_engine(backend: Backend, name: str, value: Any) -> bool:
    """Whether an option is part of an engine's identity: no place of a cache, no limit of the build."""
    return not isinstance(value, Path) and name not in backend.limits
