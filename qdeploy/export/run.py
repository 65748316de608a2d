"""The verb ``export``: a checkpoint or a model in, an ONNX bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace
from torch import nn

from qdeploy.export.any_size import plan_sizes, prove_sizes, trace_sizes
from qdeploy.export.components import has_components, write_components
from qdeploy.export.graph import save
from qdeploy.export.lower import PASSES, lower, path_of, registered_passes
from qdeploy.export.probe_inputs import probe_of
from qdeploy.export.provenance import describe, findings
from qdeploy.export.time_table import TimeTable, needs_table, plan_table, tabulate
from qdeploy.model.card import write_card
from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, artifact_or_model
from qdeploy.model.origin import find_source_model
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.quant.checkpoint import checkpoint_model, copy_pipeline_files, load_checkpoint, write_probe
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.targets import TARGETS, find_target
from qdeploy.store.artifact import (
    Artifact,
    Bundle,
    Checkpoint,
    open_artifact,
)
from qdeploy.store.builder import Draft
from qdeploy.store.facts import BundleFacts, PortFacts, SizesFacts, TimestepFacts
from qdeploy.store.manifest import Notes
from qdeploy.store.paths import default_output
from qdeploy.store.probe import PROBE
from qdeploy.store.timesteps import on_grid
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.estimate import readable_size
from qdeploy.system.plugins import code_of
from qdeploy.system.progress import say


def export(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    *,
    target: str | None = None,
    calibration: str | Path | Artifact | None = None,
    components: bool = True,
    time_table: str | None = None,
    table_rows: str = "all",
    sizes: str | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a denoiser as ONNX, in the folder layout that diffusers' ONNX pipelines open.

    Args:
        source: a checkpoint; or a model, in a folder or in memory, which is exported in full precision.
        output: folder of the bundle; ``SOURCE-onnx`` in the working directory by default.
        target: the dialect; by default the one that the checkpoint was calibrated for.
        calibration: for a model, the set that its probe comes from; or another artifact, whose probe is taken. By
            default the model's own pipeline is asked how it calls its denoiser.
        components: also export the rest of the pipeline: text encoders and autoencoders as graphs in float32,
            everything else as it is.
        time_table: how to store what depends on the timestep alone, in place of the layers that compute it:
            ``fp32``, ``fp16``, ``int8``, ``auto`` for the smallest that is exact enough; or ``none`` to keep the
            layers. By default the layers stay, or, where a method has calibrated them, ``auto``.
        table_rows: the timesteps that the table holds: ``all`` of training, or a schedule like ``ddim:50``.
        sizes: of the images that one graph shall take: ``512x512,768x512`` (height first), or from the smallest to
            the largest, ``512x512..1024x1024``. Prompts then may have any length. By default the graph has the
            size of the model's inputs.
        overwrite: replace another artifact at ``output``.

    Raises:
        UsageError: an unknown target, or one that the checkpoint was not made for.
        CapabilityError: the checkpoint is a simulation that no engine can run.
        InvalidInputError: the source cannot be used, or the graph fails the checker.
    """
    model = artifact_or_model(source)
    if isinstance(model, Path):
        checkpoint = open_artifact(model, Checkpoint)
        default = "auto" if checkpoint.facts.temporal else "none"
        limits = checkpoint.facts.timesteps
        table = _plan_table(checkpoint_model(checkpoint), time_table or default, table_rows, limits)
        return _export_checkpoint(checkpoint, output, target, components, table, sizes, overwrite)
    table = _plan_table(model, time_table or "none", table_rows)
    return _export_model(model, output, target, calibration, components, table, sizes, overwrite)


def _plan_table(
    model: Model, storage: str, rows: str, limits: TimestepFacts | None = None
) -> TimeTable | None:
    if storage != "none":
        return plan_table(model, storage, rows, limits)
    if rows != "all":
        raise UsageError("--table-rows needs a time table: choose --time-table auto, fp32, fp16 or int8")
    return None


def _export_checkpoint(
    checkpoint: Checkpoint,
    output: str | Path | None,
    target: str | None,
    components: bool,
    table: TimeTable | None,
    sizes: str | None,
    overwrite: bool,
) -> Bundle:
    facts = checkpoint.facts
    if facts.simulated:
        raise CapabilityError(
            f"{checkpoint.path} is a simulation and cannot be exported: {'; '.join(facts.simulated)}"
        )
    dialect = _dialect(target or facts.target)
    used = Recipe.from_json(checkpoint.recipe or {}).combinations
    for part, names in zip(("weights", "activations"), zip(*used, strict=True), strict=True):
        foreign = [name for name in names if name not in getattr(TARGETS[dialect], part)]
        if foreign:
            raise UsageError(
                f"target {dialect} cannot run the {foreign[0]} {part} of {checkpoint.path}: calibrate with "
                f"--target {dialect}"
            )
    place = Path(output) if output else default_output(checkpoint.path, "onnx")
    rest = _rest_of_pipeline(checkpoint, components)
    model = checkpoint_model(checkpoint)
    whole = find_source_model(checkpoint) if sizes else None
    several = plan_sizes(model, whole.path if whole else model.path, sizes, dialect)
    made_from = {"checkpoint": checkpoint.sha256, **checkpoint.made_from}
    if rest is not None:
        made_from["pipeline"] = pipeline_sha256(rest)
    draft = Draft(
        place,
        Bundle,
        made_from,
        checkpoint.recipe,
        checkpoint.seed,
        {"target": dialect, "components": rest is not None, **_asked(table, several), **_passes(dialect)},
        overwrite,
    )
    if done := draft.finished():
        return done
    with draft:
        denoiser = load_checkpoint(checkpoint)
        draft.copy(checkpoint.file(PROBE), PROBE)
        for file in (checkpoint.ranges, checkpoint.correction):
            if file is not None:
                draft.copy(file, f"{facts.component}/{file.name}")
        described = BundleFacts(
            **facts.handed_on(target=dialect, dynamic_group=_dynamic_group(denoiser), sizes=several),
            simulated=[],
        )
        notes = checkpoint.manifest.notes
        return _write(draft, denoiser, model, rest, table, described, notes)


def _export_model(
    model: Model,
    output: str | Path | None,
    target: str | None,
    calibration: Any,
    components: bool,
    table: TimeTable | None,
    sizes: str | None,
    overwrite: bool,
) -> Bundle:
    dialect = _dialect(target or "portable")
    place = Path(output) if output else default_output(model.path, "onnx")
    rest = model if components and has_components(model.path) else None
    made_from = {"model": model.sha256}
    if rest is not None:
        made_from["pipeline"] = pipeline_sha256(rest)
    several = plan_sizes(model, model.path, sizes, dialect)
    options = {
        "target": dialect,
        "components": rest is not None,
        **_asked(table, several),
        **_passes(dialect),
    }
    if calibration is not None:
        calibration = open_artifact(calibration)
        options["probe"] = calibration.sha256
    draft = Draft(place, Bundle, made_from, None, None, options, overwrite)
    if done := draft.finished():
        return done
    with draft:
        denoiser = model.load()
        inputs, carried = probe_of(model, denoiser, calibration)
        limits = carried.get("timesteps")
        if table is not None and table.schedule is None and not on_grid(limits):
            table = plan_table(model, table.storage, "all", limits)
        write_probe(draft, denoiser, inputs)
        described = BundleFacts(
            component=model.name,
            class_name=model.class_name,
            model_sha256=model.sha256,
            precision="fp32",
            weights="none",
            activations="none",
            simulated=[],
            target=dialect,
            sizes=several,
            **carried,
        )
        notes = Notes(source=model.source)
        return _write(draft, denoiser, model, rest, table, described, notes)


def _dynamic_group(denoiser: nn.Module) -> int | None:
    """How many features the runtime shall round with one scale, if it rounds them by itself."""
    found = [
        layer.dynamic.group for layer in quantized_layers(denoiser).values() if layer.dynamic is not None
    ]
    return min(found, default=None)


def _passes(target: str) -> dict[str, Any]:
    """Passes of other packages, which decide the graph too."""
    found = registered_passes(target)
    return {"passes": [path_of(each) for each in found], "code": code_of(found)} if found else {}


def _asked(table: TimeTable | None, sizes: SizesFacts | None) -> dict[str, Any]:
    asked = {} if table is None else {"time_table": table.storage, "table_rows": table.schedule}
    return asked if sizes is None else {**asked, "sizes": sizes.to_json()}


def _rest_of_pipeline(checkpoint: Checkpoint, components: bool) -> Model | None:
    """The pipeline that a checkpoint was made from, if the rest of it is to be exported."""
    if not components or checkpoint.source is None:
        return None
    model = find_source_model(checkpoint)
    if model is None:
        say(
            f"the model that {checkpoint.path} was made from is not at {checkpoint.source} any more: only its "
            "denoiser is exported"
        )
        return None
    return model if has_components(model.path) else None


def _write(
    draft: Draft[Bundle],
    denoiser: nn.Module,
    model: Model,
    rest: Model | None,
    table: TimeTable | None,
    facts: BundleFacts,
    notes: Notes,
) -> Bundle:
    from safetensors.torch import load_file

    say(f"tracing {model.class_name} into ONNX")
    probe = load_file(draft.content / PROBE)
    inputs = {name.removeprefix("input."): rows for name, rows in probe.items() if name.startswith("input.")}
    if facts.sizes is not None:
        facts = replace(facts, sizes=prove_sizes(draft, denoiser, inputs, facts.sizes))
    if table is not None:
        size = tabulate(denoiser, inputs, table)
        facts = replace(facts, time_table=table.facts(size))
        say(f"temporal features of {len(table.timesteps)} timesteps as a table of {readable_size(size)}")
    elif needs_table(denoiser):
        raise UsageError(
            "the time path of this checkpoint has a zero point for each timestep, which only a table can "
            "hold: choose --time-table auto, fp32, fp16 or int8"
        )
    freeze(denoiser)
    graph = lower(trace_sizes(denoiser, inputs, facts.sizes), facts.target)
    describe(graph, draft, facts)
    ports = [
        PortFacts(
            name=str(value.name), dtype=str(value.dtype), shape=[str(axis) for axis in value.shape or ()]
        )
        for value in graph.graph.inputs
    ]
    file = draft.content / model.name / "model.onnx"
    save(graph, file)
    del graph
    facts = replace(facts, inputs=ports, lint=findings(file) if facts.target == "tensorrt" else None)
    draft.json(f"{model.name}/config.json", model.config)
    copy_pipeline_files(draft, model.path)
    if rest is not None:
        say("tracing the rest of the pipeline")
        facts = replace(facts, pipeline=write_components(draft, rest.path))
    write_card(draft, facts)
    return draft.finish(facts=facts, notes=notes)


def _dialect(target: str) -> str:
    find_target(target)
    if target not in PASSES:
        raise UsageError(
            f"target {target!r} is for simulation and has no ONNX form: choose from {', '.join(PASSES)}"
        )
    return target
