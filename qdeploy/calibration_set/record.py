"""Record a user's own loop over a stock pipeline into a calibration set.

`qdeploy.calibration_set.collect` calls a pipeline by seeds and prompts. What it cannot know (which ControlNet, which
region, an image of the step before) a user's own loop does; here the loop runs as it is, and what the denoiser is
given in each of its calls of the pipeline is kept.
"""

from __future__ import annotations

import functools
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.layer_ranges import LayerRanges
from qdeploy.calibration_set.making import draw_ranges, ranges_name, seeded
from qdeploy.calibration_set.recorder import Recorder, chosen_calls
from qdeploy.calibration_set.script import Calls, Script, as_function
from qdeploy.calibration_set.shards import describe, open_shards, shard_files, shard_name
from qdeploy.calibration_set.survey import Survey, survey
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.inputs import sample_name
from qdeploy.model.pipeline_index import pipeline_sha256
from qdeploy.quant.time_ranges import merge_ranges
from qdeploy.store.artifact import RANGES, CalibrationFolder
from qdeploy.store.builder import Draft
from qdeploy.store.facts import SampledFacts
from qdeploy.store.manifest import Notes
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.estimate import readable_time
from qdeploy.system.progress import say

# Arguments that say what to make or how to return it, not how to sample.
_CONTENT = ("prompt", "negative_prompt", "generator", "output_type", "return_dict", "num_inference_steps")
_OWN_FACTS = ("height", "width", "eta", "guidance_scale")


class _Enough(BaseException):
    """Raised through a user's loop to stop it; no ``except Exception`` of theirs catches it."""


def record(
    pipeline: ModelSource,
    calls: Calls | Script,
    output: str | Path,
    *,
    keep: int = 20,
    samples: int = 64,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
) -> CalibrationFolder:
    """Record what a pipeline's denoiser is given in a user's own calls of the pipeline.

        def calls(pipeline):
            for prompt, edges in my_data:
                pipeline(prompt, image=edges, num_inference_steps=30)

        qdeploy.record(pipeline, calls, "set/")

    The first call is looked at in seconds, and refused with the reason if it cannot be recorded, before anything is
    sampled. All calls have to make equally many steps, of one size.

    Args:
        pipeline: a diffusers pipeline in memory; or a folder, a zoo model's name or a Hub id, which is loaded.
        calls: a function that is given the pipeline and calls it; or the keyword arguments of each call; or a script.
        output: folder of the calibration set.
        keep: denoiser calls of each trajectory to keep, evenly spread from the first to the last.
        samples: images after which the loop is stopped.
        seed: where randomness comes from that the loop takes from torch's own generator.
        device: torch device, for a pipeline that is loaded here.
        overwrite: replace another artifact at ``output``.

    Returns:
        The calibration set. A script that was interrupted is run again from its start by the next call, without
        recording twice what is there; a function leaves nothing behind if it raises.

    Raises:
        UsageError: an impossible number, or fewer steps than ``keep``.
        InvalidInputError: the loop never calls the pipeline or its denoiser, calls it in several ways, or the script
            raises. What a function raises comes through as it is.
    """
    for name, value in (("keep", keep), ("samples", samples)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    model = model_of(pipeline)
    # What a function does nobody can tell beforehand: it is another request each time.
    is_script = isinstance(calls, Script)
    identity = calls.sha256 if isinstance(calls, Script) else uuid.uuid4().hex
    asked = {"calls": identity, "keep": keep, "samples": samples, "device": device}
    made_from = {"model": model.sha256, "pipeline": pipeline_sha256(model)}
    draft = Draft(Path(output), CalibrationFolder, made_from, None, seed, asked, overwrite)
    if done := draft.finished():
        draw_ranges(done)
        return done
    if isinstance(pipeline, str | Path) or pipeline is model:
        with seeded(seed):
            loaded = model.pipeline(model.load(device)).to(device)
    else:
        loaded = pipeline
    if not hasattr(loaded, "scheduler") or not model.component:
        raise InvalidInputError(f"a {type(loaded).__name__} is no diffusers pipeline with a scheduler")
    try:
        with draft:
            loop = _Loop(loaded, getattr(loaded, model.component), keep, samples, draft)
            with seeded(seed):
                loop.run(as_function(calls))
            made = loop.finish(model.source)
    except BaseException:
        if not is_script:
            shutil.rmtree(draft.work, ignore_errors=True)
        raise
    draw_ranges(made)
    return made


class _Loop:
    """A user's loop while it runs."""

    def __init__(
        self, pipeline: Any, denoiser: nn.Module, keep: int, samples: int, draft: Draft[CalibrationFolder]
    ) -> None:
        self.pipeline, self.denoiser, self.keep, self.samples = pipeline, denoiser, keep, samples
        self.draft = draft
        self.where = type(pipeline).__name__
        self.plan: Survey | None = None
        self.sampled, self.steps = SampledFacts(), 1
        self.calls = 0
        self.images = 0
        self.ranges: list[dict[str, Tensor]] = []

    def run(self, calls: Callable[[Any], object]) -> None:
        """Let the loop call the pipeline until it ends, or enough is recorded."""
        with _intercepted(self.pipeline, self._call):
            try:
                calls(self.pipeline)
            except _Enough:
                say(f"{self.images} images are recorded, and the loop is stopped; --samples takes more")
        if not self.calls:
            raise InvalidInputError(
                f"the loop never called the {self.where} that it was given: nothing is recorded"
            )

    def _call(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.images >= self.samples:
            raise _Enough
        if self.plan is None:
            self.plan = self._look(stock, args, kwargs)
        name = shard_name(self.calls)
        if self.draft.has(name):
            result = stock(*args, **kwargs)
            self._count(self.draft.tensors(name, dict), self.draft.step(ranges_name(self.calls), dict))
            return result
        recorder = Recorder(self.pipeline, self.denoiser, self._numbers, self.keep, self.plan, stop=False)
        ranges = LayerRanges(self.denoiser, lambda: recorder.timestep)
        with ranges, recorder:
            result = stock(*args, **kwargs)
        if recorder.calls != self.plan.calls:
            raise InvalidInputError(
                f"call {self.calls + 1} of the {self.where} makes {recorder.calls} denoiser calls and the first one "
                f"{self.plan.calls}: record loops of one number of steps"
            )
        assert recorder.batch is not None
        found = {key: _in_float32(value) for key, value in recorder.batch.pack().items()}
        kept = self.draft.step(ranges_name(self.calls), ranges.tensors)
        self._count(self.draft.tensors(name, lambda: found), kept)
        return result

    def _numbers(self, rows: int) -> Tensor:
        """Numbers of the images of a call with so many rows."""
        assert self.plan is not None
        each = max(1, self.plan.rows // self.plan.images)
        return torch.arange(self.images, self.images + max(1, rows // each))

    def _count(self, shard: dict[str, Tensor], ranges: dict[str, Tensor]) -> None:
        self.calls += 1
        self.images = int(shard["image"].max()) + 1
        self.ranges.append(ranges)

    def _look(self, stock: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Survey:
        """Find out how the first call uses the denoiser, and leave its generators as they were."""

        def run(images: range) -> None:
            with torch.random.fork_rng(), _generators_kept([*args, *kwargs.values()]):
                stock(*args, **kwargs)

        plan = survey(self.pipeline, self.denoiser, run)
        chosen_calls(plan.steps, self.keep)
        say(f"the first call makes {plan.calls} denoiser calls of about {readable_time(plan.seconds)}")
        scheduler = type(self.pipeline.scheduler).__name__
        self.sampled, self.steps = (
            _sampled_facts(scheduler, kwargs),
            kwargs.get("num_inference_steps", plan.steps),
        )
        return plan

    def finish(self, source: str) -> CalibrationFolder:
        """Write what belongs to all calls."""
        assert self.plan is not None
        self.draft.tensors(RANGES, lambda: merge_ranges(self.ranges))
        facts = describe(
            open_shards(self.draft.output, shard_files(self.draft.content)),
            sample_name(self.denoiser),
            scheduler=self.sampled.scheduler,
            inference_steps=self.steps,
            guidance=self.sampled.guidance,
            call=self.plan.facts,
            sampled=self.sampled,
            range=self.plan.timestep_range,
        )
        return self.draft.finish(facts, notes=Notes(source=source))


@contextmanager
def _intercepted(pipeline: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Within, a call of the pipeline is a call of ``call`` with the stock method and the arguments."""
    stock = type(pipeline)

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(functools.partial(stock.__call__, self), *args, **kwargs)

    inside = {"__call__": __call__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    pipeline.__class__ = type(stock.__name__, (stock,), inside)
    try:
        yield
    finally:
        pipeline.__class__ = stock


@contextmanager
def _generators_kept(values: list[Any]) -> Iterator[None]:
    """Put torch generators among arguments back to where they were."""
    listed = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
    states = [(each, each.get_state()) for each in listed if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _sampled_facts(scheduler: str, kwargs: Mapping[str, Any]) -> SampledFacts:
    """How the first call was sampled, as far as its arguments are plain values."""
    plain: dict[str, Any] = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, bool | int | float | str) and name not in _CONTENT
    }
    own = {name: plain.pop(name) for name in _OWN_FACTS if name in plain}
    guidance = own.pop("guidance_scale", None)
    return SampledFacts(scheduler=scheduler, guidance=guidance, arguments=plain or None, **own)


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
