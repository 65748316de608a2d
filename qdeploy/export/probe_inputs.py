"""Inputs for the probe of a full-precision model, from the best source there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.examples import pipeline_survey
from qdeploy.model.call import CallForm
from qdeploy.model.folder import Model
from qdeploy.model.inputs import attach_form, example_inputs
from qdeploy.store.artifact import Artifact, CalibrationFolder, DenoiserArtifact
from qdeploy.store.facts import RangeFacts, TimestepFacts
from qdeploy.store.probe import read_probe
from qdeploy.system.errors import InvalidInputError, QDeployError
from qdeploy.system.progress import say

ROWS = 4


def probe_of(
    model: Model, denoiser: nn.Module, source: Artifact | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs of a network, each with rows, and their facts; the layout of its calls is set on the network.

    Args:
        model: the model.
        denoiser: its network.
        source: a calibration set of the model, or an artifact that was made from it and carries a probe. Without one
            the model's pipeline is run as far as its first call; a denoiser alone is given noise of the shapes that
            its configuration asks for.

    Raises:
        InvalidInputError: the source does not belong to the model, or there is no way to know its inputs.
    """
    if isinstance(source, CalibrationFolder):
        data = CalibrationSet.open(source.path)
        data.check_fits(model, denoiser)
        rows = torch.linspace(0, len(data) - 1, min(16, len(data))).round().long()
        return data.probe_inputs(rows), data.carried | _timesteps(
            data.timestep_range(model.training_timesteps), data.timesteps
        )
    if source is not None:
        if not isinstance(source, DenoiserArtifact):
            raise InvalidInputError(
                f"{source.path} is a {source.kind}: a probe comes from a set, a checkpoint, a bundle or an engine"
            )
        attach_form(denoiser, CallForm.of(source.facts.call))
        return read_probe(source.path)[0], {"call": source.facts.call, "sampled": source.facts.sampled}
    if model.has_pipeline:
        try:
            found = pipeline_survey(model, denoiser, ROWS)
        except QDeployError as error:
            say(
                f"the pipeline could not be asked for its inputs, so they follow from config.json: {error}",
                level=2,
            )
        else:
            attach_form(denoiser, found.saved_form)
            inputs = found.example_rows()
            return inputs, {"call": found.facts, **_timesteps(found.timestep_range, inputs["timestep"])}
    return example_inputs(model, rows=ROWS), {}


def _timesteps(limits: RangeFacts | None, met: Tensor) -> dict[str, Any]:
    """Facts of timesteps where the network is not called with whole numbers: what is met is what a table holds."""
    if limits is None:
        return {}
    met = met.float().unique()
    return {
        "timesteps": TimestepFacts(calibrated=met.tolist(), low=limits.low, high=limits.high, range=limits)
    }
