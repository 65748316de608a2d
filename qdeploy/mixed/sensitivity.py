"""The verb ``sensitivity``: how sensitive each layer is to each bit width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from qdeploy.calibrate.open_session import calibration_for
from qdeploy.calibration_set.dataset import CalibrationSet
from qdeploy.mixed.measuring import Measuring
from qdeploy.mixed.request import work_of
from qdeploy.model.in_memory import ModelSource
from qdeploy.parts.plan import Job, named
from qdeploy.parts.run import check_place
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Artifact, Sensitivity
from qdeploy.store.builder import Draft
from qdeploy.store.paths import default_output
from qdeploy.system.devices import check_device, own_device
from qdeploy.system.errors import UsageError
from qdeploy.system.estimate import Estimate

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    on: str
    workers: int | None
    worker_cpus: float


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
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
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
        on: where parts are made (see `qdeploy.parts.run.made`): the first pass is one, each layer another.
        workers: how many, on Ray.
        worker_cpus: processors for each.

    Returns:
        An artifact of kind ``sensitivity`` with ``sensitivity.json`` and ``harm.safetensors``; with
        ``dry_run`` the estimate.

    Raises:
        UsageError: unknown names, impossible numbers or combinations.
        CapabilityError: the device or Ray is not there.
        InvalidInputError: the model, the checkpoint or the set cannot be used.
    """
    check_place(on, workers, worker_cpus)
    named_formats = None if formats is None else list(formats)
    measuring = _plan(
        source,
        output,
        recipe=recipe,
        calibration=calibration,
        reference=reference,
        method=method,
        formats=named_formats,
        activations=activations,
        coverage=coverage,
        target=target,
        exclude=exclude,
        rows=rows,
        probes=probes,
        cheap=cheap,
        seed=seed,
        device=device,
        max_memory=max_memory,
        overwrite=overwrite,
    )
    if dry_run:
        return measuring.estimate()
    return measuring.carry_out(on, workers, worker_cpus)


def job(**arguments: Any) -> Job:
    """The parts of a call of `sensitivity`, by its arguments."""
    return _plan(**arguments).job


def _plan(
    source: ModelSource | Artifact,
    output: str | Path | None,
    *,
    recipe: str | Path | Recipe | None,
    calibration: str | Path | Artifact | None,
    reference: ModelSource | None,
    formats: list[str] | None,
    rows: int,
    probes: int,
    cheap: bool,
    device: str,
    max_memory: int,
    overwrite: bool,
    **chosen: Any,
) -> Measuring:
    """Open and check all inputs."""
    for name, value in {"rows": rows, "probes": probes}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    work = work_of(source, recipe, formats, reference, chosen)
    check_device(device)
    place = Path(output) if output else default_output(Path(str(work.name)), "sensitivity")
    calibrated = calibration_for(work.model, calibration, work.recipe.seed, device)
    data = CalibrationSet.open(calibrated)
    made_from = {"model": work.model.sha256, "calibration": data.sha256}
    if work.checkpoint is not None:
        made_from["checkpoint"] = work.checkpoint.sha256
    options = {"formats": list(work.formats), "rows": rows, "probes": probes, "cheap": cheap}
    draft = Draft(
        place,
        Sensitivity,
        made_from,
        work.recipe.to_json(),
        work.recipe.seed,
        options,
        overwrite,
        patience=-1,
    )
    sources = {"source": source, "output": place, "recipe": recipe, "calibration": calibrated}
    arguments = {
        **{
            name: None if path is None else named(path)
            for name, path in {**sources, "reference": reference}.items()
        },
        **chosen,
        **{"formats": formats, "rows": rows, "probes": probes, "cheap": cheap, "device": device},
        **{"max_memory": max_memory, "overwrite": overwrite},
    }
    given = [path for path in (source, reference) if path is not None]
    opens_elsewhere = not isinstance(recipe, Recipe) and None not in map(named, given)
    return Measuring(
        work,
        data,
        draft,
        rows,
        probes,
        cheap,
        own_device(device),
        max_memory,
        arguments if opens_elsewhere else None,
    )
