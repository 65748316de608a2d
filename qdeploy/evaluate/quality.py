"""Paired quality: a reference and a subject sample from the same seeds, and every metric compares them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.recorder import chosen_calls
from qdeploy.calibration_set.survey import Survey, survey
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.paired_sample import Call, Pair
from qdeploy.evaluate.quality_parts import QualityParts, meters_of, quality_parts, results_of
from qdeploy.model.folder import Model
from qdeploy.model.inputs import attach_form, denoise, flatten_inputs, sample_name
from qdeploy.model.pipeline import sample_images
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.model.sampling import CHECKING, Sampling
from qdeploy.model.schedulers import scheduler_for
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.parts.run import made
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.progress import track

# Image i of an evaluation has the seed FIRST_SEED + SEEDS_APART * seed + i: no image of a calibration set that
# was collected with an ordinary seed is used in an evaluation.
FIRST_SEED = 2**40
SEEDS_APART = 2**20
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class QualityPlan:
    """What is sampled for a comparison.

    Attributes:
        sampling: how. Its seed chooses the images: they are none that a calibration set of an ordinary seed holds.
        samples: number of images.
        keep: denoiser calls of each trajectory that are compared, evenly spread.

    Raises:
        UsageError: an impossible number.
    """

    sampling: Sampling = CHECKING
    samples: int = 64
    keep: int = 20

    def __post_init__(self) -> None:
        for name in ("samples", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sampling.seed >= SEEDS_APART:
            raise UsageError(
                f"the seed of a check must be from 0 to {SEEDS_APART - 1}, not {self.sampling.seed}"
            )

    @property
    def first_seed(self) -> int:
        """Seed of image 0."""
        return FIRST_SEED + SEEDS_APART * self.sampling.seed

    def batches(self) -> list[range]:
        """Numbers of the images in each batch."""
        return self.sampling.batches(self.samples)


@dataclass(frozen=True)
class Trajectory:
    """One batch of images and the denoiser calls that led to them.

    Attributes:
        inputs: the denoiser's inputs in each of the chosen calls.
        samples: x_t in each.
        outputs: the prediction in each.
        images: ``[N, C, H, W]`` in [0, 1].
    """

    inputs: list[dict[str, Tensor]]
    samples: list[Tensor]
    outputs: list[Tensor]
    images: Tensor

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        tensors = [self.images, *self.outputs, *(x for call in self.inputs for x in call.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Trajectories:
    """The reference's trajectories, recorded at their first use and kept as far as there is room.

    Args:
        model: the full-precision model, with its pipeline.
        plan: what to sample.
        device: torch device of the pipeline.
        kept_bytes: of trajectories that are kept for the next subject; those beyond are recorded again.

    Raises:
        InvalidInputError: the model has no pipeline that can be loaded.
    """

    def __init__(
        self, model: Model, plan: QualityPlan, device: str = "cpu", kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.model, self.plan, self.device, self._kept_bytes = model, plan, device, kept_bytes
        self._denoiser = model.load(device)
        self.rest = pipeline_sha256(model) if model.has_pipeline else ""
        self.sample = sample_name(self._denoiser)
        self._pipeline = model.pipeline(self._denoiser)
        if device != "cpu":
            self._pipeline = self._pipeline.to(device)
        self._pipeline.scheduler = scheduler_for(plan.sampling, self._pipeline.scheduler)
        self._kept: dict[int, Trajectory] = {}

    @cached_property
    def survey(self) -> Survey:
        """How the pipeline calls its denoiser."""
        setattr(self._pipeline, self.model.component, self._denoiser)

        def run(images: range) -> None:
            with _seeded(self.plan.first_seed):
                sample_images(
                    self._pipeline, self.plan.sampling, images, self.plan.first_seed, latents_alone=True
                )

        found = survey(self._pipeline, self._denoiser, run)
        attach_form(self._denoiser, found.saved_form)
        return found

    @property
    def scheduler(self) -> Any:
        """The scheduler that all of them are sampled with."""
        return self._pipeline.scheduler

    def reference(self) -> Iterator[Trajectory]:
        """The reference's own, batch by batch."""
        for number in track(range(len(self.plan.batches())), "full precision"):
            yield self._reference(number)

    def _reference(self, number: int) -> Trajectory:
        kept = self._kept.get(number)
        trajectory = kept or self._run(self._denoiser, self.plan.batches()[number], keep_inputs=True)
        if sum(each.bytes for each in self._kept.values()) + trajectory.bytes <= self._kept_bytes:
            self._kept[number] = trajectory
        return trajectory

    def pairs(self, subject: nn.Module) -> Iterator[Pair]:
        """Pairs of reference and subject, batch by batch.

        Args:
            subject: a denoiser, or an object with the same interface.

        Raises:
            InvalidInputError: the subject cannot run in the pipeline, or computes NaN or Inf.
        """
        for number in track(range(len(self.plan.batches())), "sampling in pairs"):
            yield self.pair(subject, number)

    def pair(self, subject: nn.Module, number: int) -> Pair:
        """One batch of reference and subject, by the batch's number."""
        images, reference = self.plan.batches()[number], self._reference(number)
        own = self._run(subject, images, keep_inputs=False)
        calls = []
        for inputs, sample, expected, own_sample in zip(
            reference.inputs, reference.samples, reference.outputs, own.samples, strict=True
        ):
            t = float(inputs["timestep"].flatten()[0])
            with torch.no_grad():
                predicted = denoise(subject, inputs)
            if not bool(predicted.isfinite().all()):
                raise InvalidInputError(f"it computes NaN or Inf at timestep {t:g}")
            calls.append(Call(t, *(x.cpu() for x in (expected, predicted, sample, own_sample))))
        if not bool(own.images.isfinite().all()):
            raise InvalidInputError("the images that it leads to hold NaN or Inf")
        return Pair(calls, reference.images.cpu(), own.images.cpu(), self.plan.sampling.prompts_of(images))

    def _run(self, denoiser: nn.Module, images: range, keep_inputs: bool) -> Trajectory:
        plan = self.plan
        attach_form(denoiser, self.survey.saved_form)
        setattr(self._pipeline, self.model.component, denoiser)
        with (
            _watching(self.survey, denoiser, self.sample, plan.keep, keep_inputs) as seen,
            _seeded(plan.first_seed),
        ):
            made = sample_images(self._pipeline, plan.sampling, images, plan.first_seed)
        pictures = made.pictures
        images_made = made.values if pictures is None else pictures.clamp(0, 1)
        return Trajectory(seen.inputs, seen.samples, seen.outputs, images_made)


class _Seen:
    def __init__(self) -> None:
        self.inputs: list[dict[str, Tensor]] = []
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []


@contextmanager
def _watching(
    plan: Survey, denoiser: nn.Module, sample: str, steps: int, keep_inputs: bool
) -> Iterator[_Seen]:
    """Record inputs and outputs of a denoiser in ``steps`` steps of the trajectory."""
    seen, number = _Seen(), -1
    chosen = chosen_calls(plan.steps, min(steps, plan.steps))
    wanted = {step * plan.branches + branch for step in chosen for branch in range(plan.branches)}

    def before(call: ModuleCall) -> None:
        nonlocal number
        number += 1
        if number not in wanted:
            return
        given = call.kwargs[sample] if sample in call.kwargs else call.args[0]
        seen.samples.append(given.detach().clone())
        if keep_inputs:
            inputs = flatten_inputs(call.module, call.args, call.kwargs)
            seen.inputs.append({name: value.detach().clone() for name, value in inputs.items()})

    def after(call: ModuleCall) -> None:
        if keep_inputs and number in wanted:
            first = call.output if isinstance(call.output, Tensor) else call.output[0]
            seen.outputs.append(first.detach().clone())

    with observing({"denoiser": denoiser}, before, after):
        yield seen


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some pipelines do not pass their generators on to the scheduler; these draw from torch's own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def measure_quality(
    trajectories: Trajectories,
    subject: nn.Module,
    context: MetricContext | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Every metric of a subject against the reference.

    Args:
        trajectories: of the reference.
        subject: a denoiser, or an object with the same interface.
        context: what metrics may use; by default what the model has.
        key: names the subject, and how it is run. With it an interrupted measurement resumes, and processes share it.

    Returns:
        The metrics' values by name, without those whose resources are missing.

    Raises:
        InvalidInputError: the subject cannot run in the pipeline, or computes NaN or Inf.
    """
    context = context or MetricContext(trajectories.model)
    if key is not None:
        return measure_in_parts(quality_parts(trajectories, subject, context, key))
    meters = meters_of(context)
    for pair in trajectories.pairs(subject):
        for meter in meters.values():
            meter.add(pair)
    return results_of(meters)


def measure_in_parts(parts: QualityParts, **place: Any) -> dict[str, Any]:
    """Every metric, from parts that are made at a place (see `qdeploy.parts.run.made`)."""
    with made(parts.job, **place) as folder:
        values = parts.measure(folder)
        folder.done()
    return values
