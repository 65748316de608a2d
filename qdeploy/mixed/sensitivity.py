"""The verb ``sensitivity``: how sensitive each layer is to each bit width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from safetensors.torch import load_file
from torch import Tensor

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.open_session import calibration_for, check_device, open_session
from qdeploy.calibrate.session import Session
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.mixed.estimate import first_order
from qdeploy.mixed.harm_report import harms_of, report_of
from qdeploy.mixed.measure import Exact
from qdeploy.mixed.options import LayerOptions, quantized_to
from qdeploy.mixed.request import Work, work_of
from qdeploy.mixed.rows import TimestepRows, choose_rows
from qdeploy.model.in_memory import ModelSource
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.state import code_shapes, write_state
from qdeploy.recipe.formats import NONE, parse_format
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Artifact, Sensitivity
from qdeploy.store.builder import Draft
from qdeploy.store.data_facts import AgreementFacts, SensitivityFacts
from qdeploy.store.layers import read_layers
from qdeploy.store.manifest import Notes
from qdeploy.store.measured import SensitivityMeasured
from qdeploy.store.paths import default_output
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.estimate import Estimate
from qdeploy.system.progress import say, track

if TYPE_CHECKING:
    from typing_extensions import Unpack

SENSITIVITY = "sensitivity.json"
HARM = "harm.safetensors"


class _Options(TypedDict, total=False):
    """Keyword arguments of `sensitivity`."""

    recipe: str | Path | Recipe | None
    calibration: str | Path | Artifact | None
    reference: ModelSource | None
    method: str | None
    formats: Sequence[str] | None
    activations: str | None
    coverage: str | None
    target: str | None
    exclude: tuple[str, ...] | None
    rows: int
    probes: int
    cheap: bool
    seed: int | None
    device: str
    max_memory: int
    overwrite: bool


@overload
def sensitivity(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    *,
    dry_run: Literal[True],
    **options: Unpack[_Options],
) -> Estimate: ...


@overload
def sensitivity(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    *,
    dry_run: Literal[False] = False,
    **options: Unpack[_Options],
) -> Sensitivity: ...


def sensitivity(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    calibration: str | Path | Artifact | None = None,
    reference: ModelSource | None = None,
    method: str | None = None,
    formats: Sequence[str] | None = None,
    activations: str | None = None,
    coverage: str | None = None,
    target: str | None = None,
    exclude: tuple[str, ...] | None = None,
    rows: int = 32,
    probes: int = 4,
    cheap: bool = False,
    seed: int | None = None,
    device: str = "cpu",
    max_memory: int = 4 * 2**30,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Sensitivity | Estimate:
    """Rank layers by the harm of quantizing each alone, in each format.

    Harm is the power of the prediction's error by that of the prediction, mean over timesteps. A first pass
    estimates it for all layers together from gradients; a second one measures it layer by layer. An
    interrupted run continues at the next call with the same arguments.

    Args:
        source: a model, in a folder or in memory; or a checkpoint, whose own scales and roundings are measured.
        output: folder of the result; ``SOURCE-sensitivity`` in the working directory by default.
        recipe: a preset's name, a YAML file or a recipe: which layers, which range finders, formats of the ranking.
        calibration: a calibration set of the model; without one, a default set is collected.
        reference: for a checkpoint, the model; by default the one that it was made from, where it was.
        method: whose range finders are used.
        formats: weight formats to try; by default 3 to 8 bits and the recipe's own, if the target runs them.
        activations: activation format.
        coverage: name of a coverage profile.
        target: what the result must run on.
        exclude: shell globs of layers that stay in float.
        rows: calibration rows to measure on, spread over eight timesteps.
        probes: backward passes of the first pass for each row.
        cheap: leave out the second pass.
        seed: of all random numbers.
        device: torch device.
        max_memory: bytes that recorded activations may take in memory.
        dry_run: say what it would cost, and stop.
        overwrite: replace another artifact at ``output``.

    Returns:
        An artifact of kind ``sensitivity`` with ``sensitivity.json`` and ``harm.safetensors``; with
        ``dry_run`` the estimate.

    Raises:
        UsageError: unknown names, impossible numbers or combinations.
        CapabilityError: the device is not there.
        InvalidInputError: the model, the checkpoint or the set cannot be used.
    """
    for name, value in {"rows": rows, "probes": probes}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    given = {"method": method, "activations": activations, "coverage": coverage, "target": target}
    chosen = {**given, "exclude": exclude, "seed": seed}
    work = work_of(source, recipe, formats, reference, chosen)
    check_device(device)
    place = Path(output) if output else default_output(Path(str(work.name)), "sensitivity")
    data = CalibrationSet.open(calibration_for(work.model, calibration, work.recipe.seed, device))
    made_from = {"model": work.model.sha256, "calibration": data.sha256}
    if work.checkpoint is not None:
        made_from["checkpoint"] = work.checkpoint.sha256
    options = {"formats": list(work.formats), "rows": rows, "probes": probes, "cheap": cheap}
    draft = Draft(place, Sensitivity, made_from, work.recipe.to_json(), work.recipe.seed, options, overwrite)
    if not dry_run and (done := draft.finished()):
        return done
    session = open_session(work.model, data, work.recipe, draft, device, max_memory)
    chosen_rows = choose_rows(session, rows)
    estimate = _estimate(session, work, chosen_rows, probes, cheap)
    say(
        f"sensitivity of {work.name}: {len(session.layers)} layers in {', '.join(work.formats)}, "
        f"{len(chosen_rows.numbers)} rows at {len(chosen_rows.timesteps)} timesteps; about {estimate}"
    )
    if dry_run:
        return estimate
    with draft:
        return _measure(session, work, chosen_rows, probes, cheap)


def _estimate(session: Session, work: Work, rows: TimestepRows, probes: int, cheap: bool) -> Estimate:
    """From one timed call: range finding, then backward passes at about two calls each, then each option."""
    batch = session.inputs(rows.numbers[: session.effort.batch])
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            denoise(session.denoiser, batch)
            call = (time.perf_counter() - began) / len(batch["timestep"].flatten())
    tried = len(work.formats) + (work.recipe.activations != NONE)
    first = len(rows.numbers) * (1 + tried + 2 * probes)
    second = 0 if cheap else len(rows.numbers) * tried * len(session.layers)
    ranges = 0 if work.checkpoint else len(session.rows())
    sizes = sum(parameter.numel() * 4 for parameter in session.denoiser.parameters())
    kept = (session.draft.work / "steps").glob("*exact-*")
    left = max(0, second - len(rows.numbers) * tried * len(list(kept)))
    return Estimate(call * (ranges + first + left), (2 + len(work.formats)) * sizes)


def _measure(session: Session, work: Work, rows: TimestepRows, probes: int, cheap: bool) -> Sensitivity:
    _set_quantizers(session, work)
    subjects = _subjects(session, work)

    began = time.perf_counter()
    found = session.draft.step("cheap", lambda: _estimates(session, rows, subjects, probes))
    estimates = [found[name] for name in sorted(found)]
    took = {"cheap": round(time.perf_counter() - began, 3)}
    measured: list[Tensor] | None = None
    signal: Tensor | None = None
    if not cheap:
        exact = Exact(session, rows)
        signal = exact.signal
        began = time.perf_counter()
        measured = [
            session.draft.step(f"exact-{number:04d}", partial(_noise, exact, subject))["noise"]
            for number, subject in enumerate(track(subjects, "one layer alone"))
        ]
        took["exact"] = round(time.perf_counter() - began, 3)
    layers = harms_of(session, subjects, estimates, measured)
    report = report_of(work, rows, probes, layers, measured is not None)
    session.draft.json(SENSITIVITY, report)
    tensors = {"timesteps": rows.timesteps}
    for subject, noise in zip(subjects, measured or estimates, strict=True):
        tensors[f"{subject.path}.noise"] = noise
    if signal is not None:
        tensors["signal"] = signal
    session.draft.tensors(HARM, lambda: tensors)
    facts = SensitivityFacts(
        component=work.model.name,
        class_name=work.model.class_name,
        model_sha256=work.model.sha256,
        layers=len(layers),
        formats=list(work.formats),
        exact=measured is not None,
        agreement=AgreementFacts(**report["agreement"]) if "agreement" in report else None,
    )
    notes = Notes(source=work.model.source)
    made: Sensitivity = session.draft.finish(facts, SensitivityMeasured(pass_seconds=took), notes)
    return made


def _estimates(
    session: Session, rows: TimestepRows, subjects: list[LayerOptions], probes: int
) -> dict[str, Tensor]:
    found = first_order(session, rows, subjects, probes)
    return {f"{number:04d}": noise for number, noise in enumerate(found)}


def _noise(exact: Exact, subject: LayerOptions) -> dict[str, Tensor]:
    return {"noise": exact.noise(subject)}


def _set_quantizers(session: Session, work: Work) -> None:
    """Find ranges by the recipe's own finders, or take a checkpoint's scales and roundings."""
    if work.checkpoint is not None:
        stored = load_file(work.checkpoint.quantized)
        described = read_layers(work.checkpoint.layers)
        if [layer.path for layer in described.layers] != [layer.path for layer in session.layers]:
            raise InvalidInputError(f"{work.checkpoint.path} quantizes other layers than this version would")
        write_state(session.denoiser, stored, code_shapes(session.denoiser))
        return
    weights, activations = _finders(session.recipe)
    for number, stage in enumerate((WeightRanges(weights), ActivationRanges(activations))):
        session.stage = f"{number}-{stage.name}"
        stage.run(session)


def _finders(recipe: Recipe) -> tuple[str, str]:
    """How a recipe finds the ranges of weights and of activations."""
    ranges = (stage for stage in recipe.stages if isinstance(stage, WeightRanges | ActivationRanges))
    found = {type(stage): stage.finder for stage in ranges}
    return found.get(WeightRanges, WeightRanges.finder), found.get(ActivationRanges, ActivationRanges.finder)


def _subjects(session: Session, work: Work) -> list[LayerOptions]:
    modules = quantized_layers(session.denoiser)
    if work.checkpoint is not None:
        return [
            LayerOptions(layer.path, module, {number_format.name: module.weight_quantizers})
            for layer in session.layers
            for module in [modules[layer.path]]
            for number_format in [module.formats[0]]
            if number_format is not None
        ]
    finder, _ = _finders(session.recipe)
    found = []
    for layer in track(session.layers, "formats of weights"):
        formats = [parse_format(name) for name in work.formats]
        made = {each.name: quantized_to(modules[layer.path], each, finder) for each in formats if each}
        found.append(LayerOptions(layer.path, modules[layer.path], made))
    return found
