"""Collect a calibration set: run the full-precision model once, keep what its denoiser is given.

The distribution of a denoiser's inputs drifts along the trajectory, so a set has to cover it evenly
(Q-Diffusion, arXiv 2302.04304, section 3.3.1). One pass over each image gives all its steps; starting anew for
every step, as reference code of TFMQ-DM does, costs (S - 1) / 2 times more.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from qdeploy.artifact import Artifact, Draft, sha256_files
from qdeploy.calibrate.estimate import Estimate, readable_size, readable_time
from qdeploy.calibrate.recorder import Recorded, Recorder, chosen_calls
from qdeploy.calibrate.shards import describe, open_shards, shard_name
from qdeploy.denoiser import INDEX, Model, open_model, sample_name
from qdeploy.errors import InvalidInputError, UsageError
from qdeploy.progress import say, track
from qdeploy.runtime.pipeline import generate
from qdeploy.schedulers import make_scheduler

DESCRIBING = ("*.json", "*.txt", "*.model")
WEIGHTS = ("*.safetensors",)
WITHOUT_INFLUENCE = ("vae", "safety_checker")  # components whose weights the denoiser's inputs do not depend on


@dataclass(frozen=True)
class Request:
    """What is to be collected; the arguments of `collect`, checked."""

    steps: int
    samples: int
    inference_steps: int
    scheduler: str | None
    eta: float | None
    prompts: tuple[str, ...] | None
    guidance: float | None
    seed: int
    batch: int
    height: int | None
    width: int | None
    device: str

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "inference_steps", "batch", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if self.prompts is not None and not self.prompts:
            raise UsageError("the list of prompts is empty")
        if not 0 <= self.seed < 2**63 - self.samples:
            raise UsageError(f"the seed must be a number from 0 to 2**63, not {self.seed}")

    def batches(self) -> list[range]:
        """Numbers of the images in each batch."""
        return [
            range(first, min(first + self.batch, self.samples)) for first in range(0, self.samples, self.batch)
        ]

    def prompts_of(self, images: range) -> list[str] | None:
        """A prompt for each image; the list begins anew where it ends."""
        if self.prompts is None:
            return None
        return [self.prompts[image % len(self.prompts)] for image in images]


def collect(
    model: str | Path | Model,
    output: str | Path,
    *,
    steps: int = 20,
    samples: int = 64,
    inference_steps: int = 100,
    scheduler: str | None = None,
    eta: float | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 16,
    height: int | None = None,
    width: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Artifact | Estimate:
    """Record the inputs of a model's denoiser along its sampling trajectory.

    An interrupted collection is taken up by the next call with the same arguments, and ends in the same set.

    Args:
        model: a diffusers pipeline's folder, a zoo model's name or a Hub id.
        output: folder of the calibration set.
        steps: how many denoiser calls of each trajectory to keep, evenly spread from the first to the last.
        samples: how many images to sample.
        inference_steps: how long the trajectory is, in steps of the scheduler; some call the denoiser more often.
        scheduler: a scheduler by its short name or diffusers class; the model's own if None.
        eta: DDIM's noise, 0 to 1.
        prompts: prompts or, for class-conditional models, class numbers; used in turn.
        guidance: classifier-free guidance scale; the pipeline's default if None.
        seed: image i is sampled from ``seed + i``.
        batch: how many images to sample at once; memory and the size of a shard grow with it.
        height: height of the images in pixels, where the pipeline offers a choice.
        width: width of the images in pixels.
        device: torch device.
        overwrite: replace another artifact at ``output``.
        dry_run: say what it would cost, and stop.

    Returns:
        The calibration set; with ``dry_run`` time and size on disk.

    Raises:
        UsageError: impossible numbers, missing prompts, or a trajectory shorter than ``steps``.
        InvalidInputError: the model cannot be used.
    """
    model = model if isinstance(model, Model) else open_model(model)
    request = Request(
        steps=steps,
        samples=samples,
        inference_steps=inference_steps,
        scheduler=scheduler,
        eta=eta,
        prompts=None if prompts is None else tuple(prompts),
        guidance=guidance,
        seed=seed,
        batch=min(batch, samples),
        height=height,
        width=width,
        device=device,
    )
    _check_pipeline(model, request)
    made_from = {"model": model.sha256, "pipeline": _pipeline_sha256(model)}
    draft = Draft(Path(output), "calibration-set", made_from, None, seed, asdict(request), overwrite)
    if not dry_run and (done := draft.finished()):
        return done
    denoiser = model.load(device)
    pipeline = model.pipeline(denoiser).to(device)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    work = _Work(request, pipeline, denoiser, dry_run)
    if dry_run:
        return work.estimate_only()
    with draft:
        work.run(draft)
        facts = describe(open_shards(draft.content), sample_name(denoiser))
        facts |= {
            "scheduler": type(pipeline.scheduler).__name__,
            "inference_steps": inference_steps,
            "guidance": guidance if guidance is not None else _default(pipeline, "guidance_scale"),
        }
        return draft.finish(facts, notes={"source": str(model.path.absolute())})


class _Work:
    """Samples batch after batch, and says beforehand how long it will take."""

    def __init__(self, request: Request, pipeline: Any, denoiser: nn.Module, dry_run: bool) -> None:
        self.request, self.pipeline, self.denoiser, self.dry_run = request, pipeline, denoiser, dry_run
        self.estimate: Estimate | None = None
        self._left = request.samples
        self._bar: Iterator[object] | None = None

    def estimate_only(self) -> Estimate:
        """Make a call or two of the first batch."""
        self._record(self.request.batches()[0])
        assert self.estimate is not None
        return self.estimate

    def run(self, draft: Draft) -> None:
        """Write the shards that are not there yet."""
        batches = self.request.batches()
        missing = [number for number in range(len(batches)) if not draft.has(shard_name(number))]
        self._left = sum(len(batches[number]) for number in missing)
        try:
            for number in missing:
                draft.tensors(shard_name(number), partial(self._record, batches[number]))
        finally:
            self._bar = None

    def _record(self, images: range) -> dict[str, Tensor]:
        request = self.request
        recorder = Recorder(self.pipeline, self.denoiser, torch.tensor(images), request.steps, self._after_call)
        with _seeded(request.seed + images[0]), recorder:
            generate(
                self.pipeline,
                [request.seed + image for image in images],
                request.inference_steps,
                prompts=request.prompts_of(images),
                guidance=request.guidance,
                eta=request.eta,
                height=request.height,
                width=request.width,
            )
        assert recorder.batch is not None
        return recorder.batch.pack()

    def _after_call(self, recorder: Recorder) -> None:
        # The very first call is slow, because memory and kernels are being prepared.
        if self.estimate is None and (recorder.calls == min(2, recorder.needed) or recorder.seconds[0] > 1):
            self._say_estimate(recorder)
        if self._bar is not None:
            next(self._bar, None)

    def _say_estimate(self, recorder: Recorder) -> None:
        assert recorder.batch is not None
        request, full = self.request, len(recorder.images)
        once, often = 0, 0
        for name, tensor in recorder.batch.pack().items():
            size = tensor.numel() * tensor.element_size()
            once, often = (once + size, often) if name.startswith(("condition.", "shared.")) else (once, often + size)
        kept = len(recorder.batch.calls)
        seconds = min(recorder.seconds) * recorder.needed * self._left / full
        size = (once + often * request.steps / kept) * request.samples / full
        self.estimate = Estimate(seconds, round(size))
        say(
            f"collecting {request.steps} of {recorder.total} denoiser calls for {request.samples} images with "
            f"{type(self.pipeline.scheduler).__name__}: about {readable_time(seconds)}, {readable_size(size)} on disk"
        )
        if self.dry_run:
            raise Recorded
        calls = -(-self._left // request.batch) * recorder.needed
        self._bar = track(range(calls), "collecting", total=calls)
        for _ in range(recorder.calls - 1):
            next(self._bar, None)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some pipelines do not pass their generators on to the scheduler; these draw from torch's own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _check_pipeline(model: Model, request: Request) -> None:
    """Find what is wrong with a request before anything large is loaded.

    Raises:
        UsageError: the pipeline or the scheduler cannot do what is asked.
        InvalidInputError: there is no pipeline.
    """
    if not model.has_pipeline:
        raise InvalidInputError(
            f"{model.path} holds a denoiser alone; collecting needs the whole pipeline's folder, with {INDEX}"
        )
    index = _index(model)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline is not None:
        known = inspect.signature(pipeline.__call__).parameters
        if "prompt" in known and request.prompts is None:
            raise UsageError(f"{pipeline.__name__} needs prompts: pass --prompts FILE")
        if request.prompts is not None and not {"prompt", "class_labels"} & known.keys():
            raise UsageError(f"{pipeline.__name__} takes no prompts")
    shipped = getattr(diffusers, str(index.get("scheduler", [None, None])[1]), None)
    if shipped is None:
        return
    try:
        own = shipped.from_pretrained(model.path / "scheduler")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"the scheduler in {model.path} cannot be loaded: {error}") from error
    scheduler = make_scheduler(request.scheduler, own)
    if request.eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
        raise UsageError(f"{type(scheduler).__name__} takes no eta")
    try:
        scheduler.set_timesteps(request.inference_steps)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        if request.inference_steps <= scheduler.config.get("num_train_timesteps", 0):
            return  # it needs more than the number of steps, such as the size of the image: the pipeline knows
        raise UsageError(
            f"{type(scheduler).__name__} cannot make {request.inference_steps} inference steps: {error}"
        ) from error
    chosen_calls(len(scheduler.timesteps), request.steps)


def _pipeline_sha256(model: Model) -> str:
    """Identity of everything beside the denoiser that shapes its inputs: scheduler, tokenizer, text encoder."""
    files = {INDEX: model.path / INDEX}
    for name in sorted(_index(model).keys() - {model.component}):
        for pattern in DESCRIBING if name in WITHOUT_INFLUENCE else (*DESCRIBING, *WEIGHTS):
            found = (model.path / name).rglob(pattern)
            files |= {file.relative_to(model.path).as_posix(): file for file in found}
    return sha256_files(files)


def _index(model: Model) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((model.path / INDEX).read_text())
    return index


def _default(pipeline: Any, name: str) -> Any:
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
