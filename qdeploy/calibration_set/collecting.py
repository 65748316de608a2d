"""The parts of a collection: a shard for each batch of images, with the ranges of every layer's input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdeploy.calibration_set.layer_ranges import LayerRanges
from qdeploy.calibration_set.making import seeded
from qdeploy.calibration_set.recorder import Recorder, chosen_calls
from qdeploy.calibration_set.request import Request
from qdeploy.calibration_set.shards import describe, open_shards, shard_files, shard_name
from qdeploy.calibration_set.survey import Survey, survey
from qdeploy.calibration_set.watch import Recorded
from qdeploy.model.folder import Model
from qdeploy.model.inputs import sample_name
from qdeploy.model.pipeline import sample_images
from qdeploy.model.schedulers import scheduler_for
from qdeploy.parts.folder import PartFolder, link
from qdeploy.parts.plan import Job
from qdeploy.parts.verb import ArtifactInParts
from qdeploy.quant.time_ranges import merge_ranges
from qdeploy.store.artifact import RANGES, CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.store.files import save_tensors
from qdeploy.store.manifest import Notes
from qdeploy.store.measured import Measured
from qdeploy.system.estimate import Estimate, readable_size, readable_time
from qdeploy.system.progress import say, track


class Collecting(ArtifactInParts[CalibrationFolder]):
    """Samples batch after batch, and says beforehand how long it will take."""

    def __init__(
        self,
        request: Request,
        model: Model,
        draft: Draft[CalibrationFolder],
        device: str,
        arguments: dict[str, Any] | None,
    ) -> None:
        self.request, self.model, self.draft, self.arguments = request, model, draft, arguments
        self.device = device
        self.estimate: Estimate | None = None
        self.dry_run = False
        self._left = request.samples
        self._bar: Iterator[object] | None = None

    @cached_property
    def _opened(self) -> tuple[Any, nn.Module]:
        sampling = self.request.sampling
        with seeded(sampling.seed):  # weights are drawn at random before they are loaded
            denoiser = self.model.load(self.device)
            pipeline = self.model.pipeline(denoiser).to(self.device)
        pipeline.scheduler = scheduler_for(sampling, pipeline.scheduler)
        return pipeline, denoiser

    @property
    def pipeline(self) -> Any:
        """The pipeline, opened at its first use."""
        return self._opened[0]

    @property
    def denoiser(self) -> nn.Module:
        """Its denoiser."""
        return self._opened[1]

    @cached_property
    def plan(self) -> Survey:
        """How the pipeline calls its denoiser; seconds, before hours are spent."""
        sampling = self.request.sampling

        def run(images: range) -> None:
            with seeded(sampling.seed):
                sample_images(self.pipeline, sampling, images, latents_alone=True)

        found = survey(self.pipeline, self.denoiser, run)
        chosen_calls(found.steps, self.request.keep)
        return found

    def announce(self) -> None:
        """Find out what is wrong with pipeline and request before anything is written, and how much is left."""
        assert self.plan
        missing = self.job.parts().missing()
        self._left = sum(len(self.request.batches()[number]) for number in missing)

    def estimate_only(self) -> Estimate:
        """Make a call or two of the first batch."""
        assert self.plan
        self.dry_run = True
        self._record(self.request.batches()[0])
        assert self.estimate is not None
        return self.estimate

    @property
    def job(self) -> Job:
        """The parts: a shard each, and the ranges of its batch."""
        return Job(
            "collect",
            self.place,
            self.draft.request,
            len(self.request.batches()),
            self.output,
            self.arguments,
            self.make,
            self.request.device,
            "collecting",
            shows_progress=True,
        )

    def make(self, number: int, folder: Path) -> None:
        """One shard with its ranges."""
        shard, ranges = self._record(self.request.batches()[number])
        save_tensors(shard, folder / shard_name(number))
        save_tensors(ranges, folder / RANGES)

    def fill(self, parts: PartFolder) -> CalibrationFolder:
        """The set of all parts."""
        self._bar, draft = None, self.draft
        ranges = []
        for number, files in enumerate(parts.each(self.make)):
            link(files[shard_name(number)], draft.content / shard_name(number))
            ranges.append(load_file(files[RANGES]))
        draft.tensors(RANGES, lambda: merge_ranges(ranges))
        sampling, pipeline = self.request.sampling, self.pipeline
        scheduler = type(pipeline.scheduler).__name__
        guidance = _default(pipeline, "guidance_scale") if sampling.guidance is None else sampling.guidance
        facts = describe(
            open_shards(draft.output, shard_files(draft.content)),
            sample_name(self.denoiser),
            scheduler=scheduler,
            inference_steps=sampling.steps,
            guidance=guidance,
            call=self.plan.facts,
            sampled=sampling.facts(scheduler, guidance),
            range=self.plan.timestep_range,
        )
        took = Measured(seconds=parts.seconds() + draft.seconds)
        return draft.finish(facts, took, Notes(source=self.model.source))

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
