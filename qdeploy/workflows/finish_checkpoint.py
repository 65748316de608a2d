"""The end of a calibration or an import: the session's network is written, and the checkpoint appears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from msgspec.structs import replace

from qdeploy.calibrate.session import Session
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.example_rows import ExampleRows
from qdeploy.model.card import base_model, write_card
from qdeploy.model.folder import Model
from qdeploy.quant.checkpoint import write_checkpoint, write_probe
from qdeploy.store.artifact import CORRECTION, Checkpoint
from qdeploy.store.correction_table import correction_facts
from qdeploy.store.facts import CheckpointFacts
from qdeploy.store.manifest import Notes
from qdeploy.store.measured import CheckpointMeasured
from qdeploy.workflows.calibrated_facts import any_attention, by_reason, timestep_facts

if TYPE_CHECKING:
    from qdeploy.mixed.plan import BudgetPlan

PROBE_ROWS = 16


def finish(
    session: Session,
    source: Model,
    data: CalibrationSet | ExampleRows,
    notes: Notes,
    simulated: Sequence[str] = (),
    calibrated: Sequence[float] = (),
    planned: BudgetPlan | None = None,
) -> Checkpoint:
    """Write what a session's network has become, and make the checkpoint appear.

    Args:
        session: its draft is open.
        source: the model.
        data: what the probe's rows are taken from.
        notes: where things were.
        simulated: why no engine can run it, in addition to the recipe's reasons.
        calibrated: the timesteps that its scales were found at, ascending, if they are not those of ``data``.
        planned: how a budget was met, if there was one; its report is stored with the checkpoint's files.
    """
    recipe, draft = session.recipe, session.draft
    timesteps = timestep_facts(session)
    if calibrated:
        timesteps = replace(timesteps, calibrated=list(calibrated))
    _write(session, source, data)
    if planned is not None:
        planned.write(draft, source.name)
    facts = CheckpointFacts(
        component=source.name,
        class_name=source.class_name,
        model_sha256=source.sha256,
        base_model=base_model(source),
        precision=recipe.precision,
        weights=recipe.weights,
        activations=recipe.activations,
        target=recipe.target,
        simulated=[*recipe.simulated(), *simulated],
        layers=len(session.layers),
        timesteps=timesteps,
        timestep_scales=recipe.timestep_groups != 1,
        temporal=any(layer.path in session.structure.time.layers for layer in session.layers),
        correction=correction_facts(draft.content / source.name / CORRECTION),
        left_in_float=by_reason(session.left) or None,
        **data.carried,
    )
    write_card(draft, facts)
    took = draft.time.by_label() if draft.time else {}
    made = draft.finish(facts, CheckpointMeasured(stage_seconds=took or None), notes, session.report)
    assert isinstance(made, Checkpoint)
    return made


def _write(session: Session, source: Model, data: CalibrationSet | ExampleRows) -> None:
    attentions = session.structure.attentions if any_attention(session) else ()
    write_checkpoint(
        session.draft,
        source,
        session.denoiser,
        session.layers,
        list(attentions),
        session.structure,
        session.recipe,
    )
    _, judge = session.split(range(len(data)))
    order = judge[data.timesteps[judge].argsort(stable=True)]
    chosen = order[torch.linspace(0, len(order) - 1, min(PROBE_ROWS, len(order))).round().long()]
    write_probe(session.draft, session.denoiser, data.probe_inputs(chosen.tolist(), session.device))
