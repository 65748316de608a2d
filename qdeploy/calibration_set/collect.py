"""Collect a calibration set: run the full-precision model once, keep what its denoiser is given.

The distribution of a denoiser's inputs drifts along the trajectory, so a set has to cover it evenly
(Q-Diffusion, arXiv 2302.04304, section 3.3.1). One pass over each image gives all its steps; starting anew
for every step, as reference code of TFMQ-DM does, costs (S - 1) / 2 times more. The same pass tells what range
the input of every layer has at each timestep.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from qdeploy.calibration_set.collecting import Collecting
from qdeploy.calibration_set.making import draw_ranges
from qdeploy.calibration_set.request import Request, check_pipeline
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.model.sampling import COLLECTING, Sampling, SamplingOptions, sampled, with_old_names
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.parts.plan import Job, named
from qdeploy.parts.run import check_place
from qdeploy.store.artifact import CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.system.devices import check_device, kind_of, own_device
from qdeploy.system.estimate import Estimate

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def collect(
    model: ModelSource,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    keep: int = 20,
    samples: int = 64,
    device: str = "cpu",
    overwrite: bool = False,
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    dry_run: Literal[True],
    **options: Unpack[SamplingOptions],
) -> Estimate: ...


@overload
def collect(
    model: ModelSource,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    keep: int = 20,
    samples: int = 64,
    device: str = "cpu",
    overwrite: bool = False,
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    dry_run: Literal[False] = False,
    **options: Unpack[SamplingOptions],
) -> CalibrationFolder: ...


@sampled(COLLECTING)
def collect(
    model: ModelSource,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    keep: int = 20,
    samples: int = 64,
    device: str = "cpu",
    overwrite: bool = False,
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    dry_run: bool = False,
    **options: Unpack[SamplingOptions],
) -> CalibrationFolder | Estimate:
    """Record the inputs of a model's denoiser along its sampling trajectory.

    An interrupted collection is taken up by the next call with the same arguments, and ends in the same set.

    Args:
        model: a diffusers pipeline's folder, a zoo model's name, a Hub id, or a loaded pipeline.
        output: folder of the calibration set.
        sampling: how images are sampled; 100 steps of the model's own scheduler by default.
        keep: denoiser calls of each trajectory to keep, evenly spread from the first to the last.
        samples: images to sample.
        device: torch device.
        overwrite: replace another artifact at ``output``.
        on: where parts are made (see `qdeploy.parts.run.made`).
        workers: how many, on Ray.
        worker_cpus: processors for each.
        dry_run: say what it would cost, and stop.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        The calibration set; with ``dry_run`` time and size on disk.

    Raises:
        UsageError: impossible numbers, missing prompts, or a trajectory shorter than ``keep``.
        InvalidInputError: the model cannot be used.
        CapabilityError: the device, Ray or space on the disk is not there.
    """
    check_place(on, workers, worker_cpus)
    check_device(device)
    given, keep = with_old_names(dict(options), keep)
    work = _plan(model, output, (sampling or COLLECTING).changed(given), keep, samples, device, overwrite)
    if dry_run:
        return work.estimate_only()
    finished = work.carry_out(on, workers, worker_cpus)
    draw_ranges(finished)
    return finished


def job(**arguments: Any) -> Job:
    """The parts of a call of `collect`, by its arguments."""
    return _plan(**arguments).job


def _plan(
    model: ModelSource,
    output: str | Path,
    sampling: Sampling,
    keep: int,
    samples: int,
    device: str,
    overwrite: bool = False,
) -> Collecting:
    """Check all inputs; nothing large is loaded, and nothing written."""
    opened = model_of(model)
    chosen = with_shipped_prompts(sampling, opened.path)
    chosen = replace(chosen, batch=min(chosen.batch, max(1, samples)))
    request = Request(chosen, keep, samples, kind_of(device))
    check_pipeline(opened, request)
    made_from = {"model": opened.sha256, "pipeline": pipeline_sha256(opened)}
    if chosen.folder is not None:
        made_from["inputs"] = chosen.folder.sha256
    described = request.to_json()
    draft = Draft(
        Path(output), CalibrationFolder, made_from, None, chosen.seed, described, overwrite, patience=-1
    )
    name = named(model)
    arguments = {
        "model": name,
        "output": named(Path(output)),
        "sampling": sampling.arguments_json(),
        "keep": keep,
        "samples": samples,
        "device": device,
        "overwrite": overwrite,
    }
    return Collecting(request, opened, draft, own_device(device), None if name is None else arguments)
