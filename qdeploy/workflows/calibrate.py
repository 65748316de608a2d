"""The verb ``calibrate``: a model and a calibration set in, a checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from qdeploy.calibrate.open_session import calibration_for, open_session
from qdeploy.calibrate.run_stages import estimate_cost, run_stages
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.example_rows import ExampleRows
from qdeploy.mixed.budget import parse_budget
from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.resolve import resolve_recipe
from qdeploy.recipe.stages import Stage
from qdeploy.store.artifact import Artifact, Checkpoint, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.manifest import Notes
from qdeploy.store.paths import default_output
from qdeploy.system.devices import check_device, own_device
from qdeploy.system.errors import UsageError
from qdeploy.system.estimate import Estimate
from qdeploy.system.plugins import code_of
from qdeploy.system.processes import (
    are_together,
    leads,
    of_the_first,
    process_count,
    working_together,
)
from qdeploy.system.progress import say
from qdeploy.workflows.advice import advise
from qdeploy.workflows.calibrate_together import check_shareable, own_draft, run_together
from qdeploy.workflows.calibrated_facts import by_reason
from qdeploy.workflows.finish_checkpoint import finish
from qdeploy.workflows.preflight import check_traceable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qdeploy.mixed.plan import BudgetPlan

LONG_S = 600  # what takes longer is tried whole before it begins


class _Options(TypedDict, total=False):
    """Keyword arguments of `calibrate`."""

    recipe: str | Path | Recipe | None
    calibration: str | Path | Artifact | None
    method: str | None
    weights: str | None
    activations: str | None
    coverage: str | None
    target: str | None
    effort: str | None
    softmax: str | None
    stages: Sequence[Stage] | None
    options: Mapping[str, Mapping[str, Any]] | None
    exclude: Sequence[str] | None
    timestep_groups: str | int | tuple[float, ...] | None
    budget: str | Sequence[str] | None
    sensitivity: str | Path | Artifact | None
    seed: int | None
    device: str
    max_memory: int
    overwrite: bool
    data_parallel: bool


@overload
def calibrate(
    model: ModelSource,
    output: str | Path | None = None,
    *,
    dry_run: Literal[True],
    **options: Unpack[_Options],
) -> Estimate: ...


@overload
def calibrate(
    model: ModelSource,
    output: str | Path | None = None,
    *,
    dry_run: Literal[False] = False,
    **options: Unpack[_Options],
) -> Checkpoint: ...


def calibrate(
    model: ModelSource,
    output: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    calibration: str | Path | Artifact | None = None,
    method: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    coverage: str | None = None,
    target: str | None = None,
    effort: str | None = None,
    softmax: str | None = None,
    stages: Sequence[Stage] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    exclude: Sequence[str] | None = None,
    timestep_groups: str | int | tuple[float, ...] | None = None,
    budget: str | Sequence[str] | None = None,
    sensitivity: str | Path | Artifact | None = None,
    seed: int | None = None,
    device: str = "cpu",
    max_memory: int = 4 * 2**30,
    dry_run: bool = False,
    overwrite: bool = False,
    data_parallel: bool = False,
) -> Checkpoint | Estimate:
    """Quantize a denoiser.

    Args:
        model: a diffusers folder, a bundled model's name, a Hub id, or a loaded diffusers pipeline or network.
        output: folder of the checkpoint; ``MODEL-PRECISION`` in the working directory by default.
        recipe: a `Recipe`, a preset's name or a YAML file; the arguments below override it.
        calibration: a calibration set that `collect` made from this model; without one, a default set is
            collected and kept in the cache, if a stage of the recipe looks at rows.
        method: name of a method.
        weights: format of weights: ``int8``, ``int4``, ...
        activations: format of activations: ``int8``, ..., or ``none``.
        coverage: name of a coverage profile.
        target: what the result must run on.
        effort: ``fast``, ``balanced``, ``thorough`` or ``best``.
        softmax: where the coverage quantizes attention, the format of the softmax output; ``none`` for float.
        stages: the stages in their order, such as ``[WeightRanges("lp"), AdaRound(), ActivationRanges()]``.
        options: options of stages to set, by stage and option: ``{"round-weights": {"steps": 5000}}``.
        exclude: shell globs of layers that stay in float.
        timestep_groups: groups of timesteps that have activation scales of their own: how many, or the
            largest timestep of each but the last, as numbers or as text ``200,500``.
        budget: bounds such as ``size=3.2MB`` or ``macs=5%`` within which the formats of weights are chosen,
            layer by layer; see `qdeploy.mixed.budget.parse_budget`.
        sensitivity: what `qdeploy.sensitivity` measured; with a budget and without this it is measured first.
        seed: where all randomness comes from.
        device: torch device.
        max_memory: bytes that recorded activations may take in memory.
        dry_run: say what it would cost, make sure that the network can become a graph, and stop.
        overwrite: replace another artifact at ``output``.
        data_parallel: share the rows of each step of learning with the other processes that torchrun started, on a
            GPU each with ``device="cuda"``. The result is that of one process but for rounding, and has an identity
            of its own. Stages that learn nothing are done by all.

    Returns:
        The checkpoint; with ``dry_run`` the estimate.

    Raises:
        UsageError: unknown names or impossible combinations.
        CapabilityError: the device is not there.
        InvalidInputError: the model or the set cannot be used.
    """
    from qdeploy.mixed.plan import plan_for

    limits = parse_budget(budget) if budget else {}
    if limits and weights:
        raise UsageError("the budget chooses the formats of weights: leave out --weights")
    if sensitivity is not None and not limits:
        raise UsageError("sensitivities serve a budget: pass --budget size=... or macs=...")
    resolved = resolve_recipe(
        recipe,
        method=method,
        weights=weights,
        activations=activations,
        coverage=coverage,
        target=target,
        effort=effort,
        softmax=softmax,
        stages=stages,
        options=options,
        exclude=exclude,
        timestep_groups=timestep_groups,
        seed=seed,
    )
    check_device(device)
    if data_parallel:
        check_shareable(resolved)
        device = own_device(device)
    source = model_of(model)
    data: CalibrationSet | ExampleRows
    made_from: dict[str, str] = {"model": source.sha256}
    asked: dict[str, Any] = {}
    if calibration is None and not limits and not resolved.needs_rows:
        data = ExampleRows(source, seed=resolved.seed)
    else:
        data = CalibrationSet.open(calibration_for(source, calibration, resolved.seed, device))
        made_from["calibration"] = data.sha256
    planned = None
    if isinstance(data, CalibrationSet) and limits:
        planned = plan_for(source, data, resolved, limits, sensitivity, device)
    if planned is not None:
        resolved, asked = planned.recipe, {"budget": dict(planned.bounds)}
        made_from["sensitivity"] = planned.sensitivity
        say(planned.table())
    output = Path(output) if output else default_output(source.path, resolved.precision.lower())
    if code := code_of(type(stage) for stage in resolved.stages):
        asked["code"] = code
    if data_parallel:
        asked["processes"] = process_count()
    draft = Draft(
        output, Checkpoint, made_from, resolved.to_json(), resolved.seed, asked, overwrite=overwrite
    )
    run = partial(_run, source, data, resolved, draft, planned, device, max_memory, dry_run)
    if not data_parallel:
        return run()
    with working_together(device):
        return run()


def _run(
    source: Model,
    data: CalibrationSet | ExampleRows,
    resolved: Recipe,
    draft: Draft[Checkpoint],
    planned: BudgetPlan | None,
    device: str,
    max_memory: int,
    dry_run: bool,
) -> Checkpoint | Estimate:
    """The checkpoint, by this process or by those that work together."""
    together = are_together()
    if not dry_run:
        done = draft.finished() if leads() else None
        if of_the_first(done is not None):
            return done or open_artifact(draft.output, Checkpoint)
    streamed = isinstance(data, ExampleRows) and device == "cpu" and not dry_run
    own = own_draft(draft) if together else draft
    session = open_session(source, data, resolved, own, device, max_memory, streamed)
    estimate = estimate_cost(session)
    say(
        f"calibrating {source.path.name}: {resolved.method} {resolved.precision}, {len(session.layers)} layers "
        f"in {len(session.units)} units, effort {resolved.effort}; about {estimate}"
    )
    for reason, paths in by_reason(session.left).items():
        say(f"in float: {len(paths)} layers, {reason}")
    for reason in resolved.simulated():
        say(f"simulated: {reason}; no engine will run this checkpoint")
    advise(resolved, device, estimate.seconds)
    if (dry_run or (estimate.seconds > LONG_S and not streamed)) and not resolved.simulated():
        check_traceable(session.denoiser, data.inputs([0], device=device))
    if dry_run:
        return estimate
    write = partial(finish, session, source, data, Notes(source=source.source), planned=planned)
    if together:
        return run_together(session, draft, write)
    with draft:
        run_stages(session)
        return write()
