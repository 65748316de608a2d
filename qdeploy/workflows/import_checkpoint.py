"""The verb ``import-checkpoint``: convert a quantized network of a method's authors into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from qdeploy.calibrate.open_session import session_on
from qdeploy.calibrate.published.fit import Fitted, fit
from qdeploy.calibrate.published.layouts import find_layout, read_published
from qdeploy.calibrate.published.place import PublishedSteps, not_for_engines, place
from qdeploy.calibrate.published.recipe import as_published, recipe_of
from qdeploy.calibration_set.example_rows import ExampleRows
from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.network.roles import find_structure
from qdeploy.recipe.formats import NONE
from qdeploy.store.artifact import Checkpoint
from qdeploy.store.builder import Draft
from qdeploy.store.manifest import Notes
from qdeploy.store.paths import default_output
from qdeploy.system.devices import check_device
from qdeploy.system.errors import UsageError
from qdeploy.system.hashing import sha256_file
from qdeploy.system.progress import say
from qdeploy.workflows.finish_checkpoint import finish


def import_checkpoint(
    file: str | Path,
    model: ModelSource,
    output: str | Path | None = None,
    *,
    method: str,
    weights: str | None = None,
    activations: str | None = None,
    timesteps: str | Sequence[float] | None = None,
    merge_timesteps: bool = False,
    float_attention: bool = False,
    target: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Checkpoint:
    """Make a checkpoint of a quantized network that the code of a paper wrote, bit for bit.

    Codes are ``clamp(floor(W / delta) + [alpha >= 0] + zero_point)`` with the file's numbers; so are all scales.
    Layers that the file does not quantize stay in float.

    Args:
        file: what the authors' code saved. Read as tensors only: code in it is never executed.
        model: the model that it was made from, as diffusers stores it.
        output: folder of the checkpoint; ``MODEL-METHOD`` in the working directory by default.
        method: whose code wrote it: ``qdiffusion``, ``tfmq``, ``quest``, ``dgq`` or ``brecq``.
        weights: their format, such as ``uint4``, which the file does not say. By default 4 or 8 bits, as zero points
            have it; with a sign where all are zero.
        activations: their format; ``none`` leaves the file's scales of activations. By default ``uint8``, or ``int8``
            where there are no zero points.
        timesteps: those that the file's scales of activations belong to, the noisiest first, as numbers or as text
            ``981,961``; by default those of the model's own scheduler for as many steps.
        merge_timesteps: one range for each activation outside of the time path, that holds those of all timesteps.
        float_attention: leave q, k, v and the softmax output in float.
        target: what the result must run on; by default an engine's where one can run it.
        device: torch device.
        overwrite: replace another artifact at ``output``.

    Raises:
        UsageError: unknown names, or timesteps that do not fit.
        CapabilityError: no quantizer here can hold the file's scales.
        InvalidInputError: the file is not of this method or of this network, or holds more than tensors.
    """
    path = Path(file)
    find_layout(method)
    check_device(device)
    source = model_of(model)
    given = parse_timesteps(timesteps)
    network = read_published(path, method)
    denoiser = source.load(device)
    data = ExampleRows(source)
    structure = find_structure(denoiser, data.inputs([0], device=device))
    fitted = fit(network, denoiser, structure, str(path))
    if activations == NONE or float_attention:
        fitted.attentions.clear()
    if activations == NONE:
        for layer in fitted.layers.values():
            layer.inputs = []
        fitted.steps = 1
    steps = _steps(fitted, source, given, method, merge_timesteps, path)
    recipe = recipe_of(fitted, structure, method, weights, activations, target, steps)
    place_to = Path(output) if output else default_output(source.path, method)
    made_from = {"model": source.sha256, "file": sha256_file(path)}
    asked = {"timesteps": steps.timesteps.tolist(), "merge": merge_timesteps}
    draft = Draft(place_to, Checkpoint, made_from, recipe.to_json(), recipe.seed, asked, overwrite)
    if done := draft.finished():
        return done
    structure = as_published(structure, fitted)
    session = session_on(source, denoiser, structure, data, recipe, draft, device)
    temporal = set(structure.time.layers)
    place(denoiser, fitted, steps, temporal, method)
    reasons = not_for_engines(denoiser, temporal)
    say(
        f"{path.name}: {recipe.precision} of {method}, {len(session.layers)} of {len(structure.layers)} layers "
        "quantized" + (f", scales for {fitted.steps} steps" if fitted.steps > 1 else "")
    )
    for reason in [*recipe.simulated(), *reasons]:
        say(f"simulated: {reason}; no engine will run this checkpoint")
    with draft:
        notes = Notes(source=source.source, file=str(path.absolute()))
        calibrated = steps.timesteps.flip(0).tolist()
        return finish(session, source, data, notes, reasons, calibrated)


def parse_timesteps(given: str | Sequence[float] | None) -> Tensor | None:
    """Timesteps [K] from numbers, or from text such as ``981,961,941``.

    Raises:
        UsageError: they are not numbers, or do not descend.
    """
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else list(given)
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise UsageError(f"timesteps are numbers such as 981,961,941, not {given!r}") from error
    if any(not a > b for a, b in pairwise(numbers)) or not all(0 <= number < 1e6 for number in numbers):
        raise UsageError("timesteps must descend, each once, as sampling meets them: 981,961,...,1")
    return torch.tensor(numbers, dtype=torch.float64)


def _steps(
    fitted: Fitted, source: Model, given: Tensor | None, method: str, merged: bool, path: Path
) -> PublishedSteps:
    """The timesteps of the file's scales; entries of a timestep that a schedule repeats are dropped but the first."""
    if fitted.steps == 1:
        return PublishedSteps(torch.zeros(0))
    trained = source.training_timesteps
    found = _scheduled(source, fitted.steps) if given is None else given
    if found is None or len(found) != fitted.steps:
        counted = "as many as no schedule of the model has" if found is None else f"not {len(found)}"
        raise UsageError(
            f"{path} has scales for {fitted.steps} timesteps, {counted}: name them with --timesteps"
        )
    if trained is not None and float(found.max()) >= trained:
        raise UsageError(
            f"the model was trained with {trained} timesteps, and {float(found.max()):g} is none of them"
        )
    first = [0, *(number for number in range(1, len(found)) if found[number] != found[number - 1])]
    if len(first) < len(found):
        grids = [grid for layer in fitted.layers.values() for grid in layer.inputs]
        for grid in [*grids, *(g for each in fitted.attentions.values() for g in each.operands.values())]:
            if len(grid.delta) > 1:
                grid.delta, grid.zero_point = grid.delta[first], grid.zero_point[first]
        fitted.steps = len(first)
    return PublishedSteps(found[first], upwards=method == "quest", merged=merged)


def _scheduled(source: Model, count: int) -> Tensor | None:
    """Timesteps of the model's own scheduler that call the denoiser so often; None if none do."""
    for steps in (count, count - 1):
        scheduler = source.scheduler()
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, TypeError, ZeroDivisionError):
            continue
        timesteps = torch.as_tensor(scheduler.timesteps).double()
        if len(timesteps) == count and bool((timesteps[1:] <= timesteps[:-1]).all()):
            return timesteps
    return None
