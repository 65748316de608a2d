"""What a calibration begins with: a device, a calibration set, and a session on a loaded model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from qdeploy.calibrate.session import Session
from qdeploy.calibrate.timestep_groups import check_groups
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.calibration_set.example_rows import ExampleRows
from qdeploy.model.folder import Model
from qdeploy.model.pipeline_index import read_index
from qdeploy.model.unloaded import load_rest
from qdeploy.network.roles import Structure, find_structure
from qdeploy.quant.insert import left_in_float, quantize_structure
from qdeploy.quant.layer import quantized_layers
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Artifact, CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.store.correction_table import prediction_type
from qdeploy.store.paths import cache_entry
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say


def calibration_for(source: Model, given: Any, seed: int, device: str) -> Path:
    """Folder of the calibration set that is given, or of the default one, collected at its first use.

    Raises:
        UsageError: the model takes prompts, so there is no default.
    """
    if given is not None:
        return given.path if isinstance(given, Artifact) else Path(given)
    from qdeploy.calibration_set.collect import collect

    index = read_index(source.path)
    if index is not None and "text_encoder" in index.components:
        raise UsageError(f"{source.path} takes prompts: collect a set with `qdeploy collect --prompts` first")
    say("no calibration set was given: collecting a default one")
    name = f"{source.sha256[:16]}-seed{seed}"
    with cache_entry("calibration", name) as place:
        collected = collect(source, place, seed=seed, device=device)
    assert isinstance(collected, CalibrationFolder)
    return collected.path


def open_session(
    source: Model,
    data: CalibrationSet | ExampleRows,
    recipe: Recipe,
    draft: Draft[Any],
    device: str,
    max_memory: int,
    streamed: bool = False,
) -> Session:
    """A model loaded and quantized as a recipe says, ready for stages.

    Args:
        source: the model.
        data: rows that stages find scales on.
        recipe: resolved.
        draft: the checkpoint in the making.
        device: where the denoiser goes.
        max_memory: bytes that recorded activations may take.
        streamed: leave the weights of layers in the model's files, to be read one after the other; for recipes
            whose stages look at no rows, on a CPU.

    Raises:
        InvalidInputError: the set does not belong to the model.
        UsageError: nothing would be quantized.
    """
    denoiser = source.load(device, streamed)
    began = time.perf_counter()
    if isinstance(data, ExampleRows):
        with data.fitting(source):
            structure = find_structure(denoiser, data.inputs([0], device=device))
    else:
        data.check_fits(source, denoiser)
        structure = find_structure(denoiser, data.inputs([0], device=device))
    pass_seconds = (time.perf_counter() - began) / 2  # of the two runs that the structure takes
    left = left_in_float(denoiser, structure, recipe)
    session = session_on(source, denoiser, structure, data, recipe, draft, device)
    session.max_memory, session.left, session.pass_seconds = max_memory, left, pass_seconds
    check_groups(recipe.timestep_groups, data.timesteps[session.rows()])
    return session


def session_on(
    source: Model,
    denoiser: nn.Module,
    structure: Structure,
    data: CalibrationSet | ExampleRows,
    recipe: Recipe,
    draft: Draft[Any],
    device: str,
) -> Session:
    """Quantize a loaded denoiser in place as a recipe says.

    Args:
        source: what it was loaded from.
        denoiser: in full precision, on the device.
        structure: what it is made of.
        data: rows that stages find scales on.
        recipe: resolved.
        draft: the checkpoint in the making.
        device: where the denoiser is.

    Returns:
        The session that stages work on, with nothing found yet.

    Raises:
        UsageError: nothing would be quantized.
    """
    layers = quantize_structure(denoiser, structure, recipe)
    load_rest(denoiser, {layer.inner for layer in quantized_layers(denoiser).values()})
    denoiser.eval().requires_grad_(False)
    if device != "cpu":
        denoiser.to(device)
    return Session(
        denoiser,
        structure,
        layers,
        data,
        recipe,
        draft,
        device,
        training_timesteps=source.training_timesteps,
        timestep_range=data.timestep_range(source.training_timesteps),
        component=source.name,
        prediction_type=prediction_type(source.scheduler_config),
    )
