"""Collect a calibration set: run the full-precision model once, keep what its denoiser is given.

The distribution of a denoiser's inputs drifts along the trajectory, so a set has to cover it evenly
(Q-Diffusion, arXiv 2302.04304, section 3.3.1). One pass over each image gives all its steps; starting anew
for every step, as reference code of TFMQ-DM does, costs (S - 1) / 2 times more. The same pass tells what range
the input of every layer has at each timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.layer_ranges import LayerRanges
from qdeploy.calibration_set.making import draw_ranges, ranges_name, seeded
from qdeploy.calibration_set.recorder import Recorder, chosen_calls
from qdeploy.calibration_set.request import Request, check_pipeline
from qdeploy.calibration_set.shards import describe, open_shards, shard_files, shard_name
from qdeploy.calibration_set.survey import Recorded, Survey, survey
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.inputs import sample_name
from qdeploy.model.pipeline import sample_images
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.model.sampling import COLLECTING, Sampling, SamplingOptions, sampled, with_old_names
from qdeploy.model.schedulers import scheduler_for
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.quant.time_ranges import merge_ranges
from qdeploy.store.artifact import RANGES, CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.store.manifest import Notes
from qdeploy.system.estimate import Estimate, readable_size, readable_time
from qdeploy.system.progress import say, track

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
    dry_run: bool = False,
    **options: Unpack[SamplingOptions],
) -> CalibrationFolder | Estimate:
    """Record the inputs of a model's denoiser along its sampling trajectory.

    An interrupted collection is taken up by the next call with the same arguments, and ends in the same set.

    Args:
        model: a diffusers pipeline's folder, a zoo model's name or a Hub id.
        output: folder of the calibration set.
        sampling: how images are sampled; 100 steps of the model's own scheduler by default.
        keep: denoiser calls of each trajectory to keep, evenly spread from the first to the last.
        samples: images to sample.
        device: torch device.
        overwrite: replace another artifact at ``output``.
        dry_run: say what it would cost, and stop.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        The calibration set; with ``dry_run`` time and size on disk.

    Raises:
        UsageError: impossible numbers, missing prompts, or a trajectory shorter than ``keep``.
        InvalidInputError: the model cannot be used.
    """
    model = model_of(model)
    given, keep = with_old_names(dict(options), keep)
    chosen = with_shipped_prompts((sampling or COLLECTING).changed(given), model.path)
    request = Request(replace(chosen, batch=min(chosen.batch, max(1, samples))), keep, samples, device)
    check_pipeline(model, request)
    made_from = {"model": model.sha256, "pipeline": pipeline_sha256(model)}
    if chosen.folder is not None:
        made_from["inputs"] = chosen.folder.sha256
    draft = Draft(Path(output), CalibrationFolder, made_from, None, chosen.seed, request.to_json(), overwrite)
    if not dry_run and (done := draft.finished()):
        draw_ranges(done)
        return done
    with seeded(chosen.seed):  # weights are drawn at random before they are loaded
        denoiser = model.load(device)
        pipeline = model.pipeline(denoiser).to(device)
    pipeline.scheduler = scheduler_for(chosen, pipeline.scheduler)
    work = _Work(request, pipeline, denoiser, dry_run)
    work.look()
    if dry_run:
        return work.estimate_only()
    with draft:
        work.run(draft)
        scheduler = type(pipeline.scheduler).__name__
        guidance = _default(pipeline, "guidance_scale") if chosen.guidance is None else chosen.guidance
        facts = describe(
            open_shards(draft.output, shard_files(draft.content)),
            sample_name(denoiser),
            scheduler=scheduler,
            inference_steps=chosen.steps,
            guidance=guidance,
            call=work.plan.facts,
            sampled=chosen.facts(scheduler, guidance),
            range=work.plan.timestep_range,
        )
        made = draft.finish(facts, notes=Notes(source=model.source))
    draw_ranges(made)
    return made


class _Work:
    """Samples batch after batch, and says beforehand how long it will take."""

    def __init__(self, request: Request, pipeline: Any, denoiser: nn.Module, dry_run: bool) -> None:
        self.request, self.pipeline, self.denoiser, self.dry_run = request, pipeline, denoiser, dry_run
        self.plan: Survey
        self.estimate: Estimate | None = None
        self._left = request.samples
        self._bar: Iterator[object] | None = None

    def look(self) -> None:
        """Find out how the pipeline calls its denoiser; seconds, before hours are spent."""

        sampling = self.request.sampling

        def run(images: range) -> None:
            with seeded(sampling.seed):
                sample_images(self.pipeline, sampling, images, latents_alone=True)

        self.plan = survey(self.pipeline, self.denoiser, run)
        chosen_calls(self.plan.steps, self.request.keep)

    def estimate_only(self) -> Estimate:
        """Make a call or two of the first batch."""
        self._record(self.request.batches()[0])
        assert self.estimate is not None
        return self.estimate

    def run(self, draft: Draft[CalibrationFolder]) -> None:
        """Write the shards that are not there yet, then the ranges over all of them."""
        batches = self.request.batches()
        missing = [number for number in range(len(batches)) if not draft.has(shard_name(number))]
        self._left = sum(len(batches[number]) for number in missing)
        try:
            for number in missing:
                draft.tensors(shard_name(number), partial(self._shard, draft, number, batches[number]))
        finally:
            self._bar = None
        ranges = [
            draft.step(ranges_name(number), partial(self._ranges, images))
            for number, images in enumerate(batches)
        ]
        draft.tensors(RANGES, lambda: merge_ranges(ranges))

    def _shard(self, draft: Draft[CalibrationFolder], number: int, images: range) -> dict[str, Tensor]:
        """One shard. Its ranges are in the journal before it is written, so they are there where it is."""
        shard, ranges = self._record(images)
        draft.step(ranges_name(number), lambda: ranges)
        return shard

    def _ranges(self, images: range) -> dict[str, Tensor]:
        return self._record(images)[1]

    def _record(self, images: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sampling = self.request.sampling
        numbers = torch.tensor(images)
        recorder = Recorder(
            self.pipeline, self.denoiser, numbers, self.request.keep, self.plan, self._after_call
        )
        ranges = LayerRanges(self.denoiser, lambda: recorder.timestep)
        with seeded(sampling.seed + images[0]), ranges, recorder:
            sample_images(self.pipeline, sampling, images)
        assert recorder.batch is not None
        return recorder.batch.pack(), ranges.tensors()

    def _after_call(self, recorder: Recorder) -> None:
        # The very first call is slow, because memory and kernels are being prepared.
        if self.estimate is None and (recorder.calls == min(2, recorder.needed) or recorder.seconds[0] > 1):
            self._say_estimate(recorder)
        if self._bar is not None:
            next(self._bar, None)

    def _say_estimate(self, recorder: Recorder) -> None:
        assert recorder.batch is not None
        request, full = self.request, len(recorder.images)
        packed = recorder.batch.pack()
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in packed.items()}
        once = sum(size for name, size in sizes.items() if name.startswith(("condition.", "shared.")))
        per_call = (sum(sizes.values()) - once) / len(recorder.batch.calls) * self.plan.branches
        seconds = min(recorder.seconds[:2]) * recorder.needed * self._left / full
        size = (once + per_call * request.keep) * request.samples / full
        self.estimate = Estimate(seconds, round(size))
        kept = request.keep * self.plan.branches
        say(
            f"collecting {kept} of {self.plan.calls} denoiser calls for {request.samples} images, "
            f"{type(self.pipeline.scheduler).__name__}: about {readable_time(seconds)}, "
            f"{readable_size(size)} on disk"
        )
        if self.dry_run:
            raise Recorded
        calls = -(-self._left // request.sampling.batch) * recorder.needed
        self._bar = track(range(calls), "collecting", total=calls)
        for _ in range(recorder.calls - 1):
            next(self._bar, None)


def _default(pipeline: Any, name: str) -> Any:
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
