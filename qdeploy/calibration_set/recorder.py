"""Watch a stock diffusers pipeline sample, and keep what its denoiser is given."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.batch import Batch
from qdeploy.calibration_set.survey import Survey
from qdeploy.calibration_set.watch import Recorded
from qdeploy.model.call import read_call, signature_of
from qdeploy.model.inputs import sample_name
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.system.errors import InvalidInputError, UsageError


def chosen_calls(calls: int, steps: int) -> list[int]:
    """``steps`` numbers of calls, evenly spread from the first to the last of ``calls``.

    (Q-Diffusion's code takes every ``calls // steps``-th, which is 26 of 51 where 25 were asked for.)

    Raises:
        UsageError: there are fewer calls than steps.
    """
    if steps > calls:
        raise UsageError(
            f"{steps} steps cannot be chosen from a trajectory of {calls} denoiser calls: "
            "ask for fewer steps or for more inference steps"
        )
    return [int(call) for call in torch.linspace(0, calls - 1, steps, dtype=torch.float64).round()]


def conditional_half(prediction: Tensor, guided: Tensor) -> int | None:
    """Which half of a batch is the conditional one under classifier-free guidance.

    Pipelines stack the two in either order. Guidance (Ho & Salimans, arXiv 2207.12598) makes
    ``u + g (c - u)`` with g > 1 of them, so that the conditional prediction has a positive weight in the
    result and the unconditional one a negative, whatever g is and however the result is rescaled. The weights
    are found by least squares.

    Args:
        prediction: the network's output, ``[2N, C, ...]``.
        guided: what the scheduler is given, ``[N or 2N, C or fewer, ...]``.

    Returns:
        0 or 1; None if both halves are the same or the result is no such combination of them.
    """
    if prediction.ndim != guided.ndim or prediction.ndim < 2 or len(prediction) % 2:
        return None
    half, channels = len(prediction) // 2, guided.shape[1]
    halves = [part[:, :channels].double().flatten() for part in (prediction[:half], prediction[half:])]
    target = guided[:half].double().flatten()
    if halves[0].shape != target.shape or not all(bool(each.isfinite().all()) for each in (*halves, target)):
        return None
    basis = torch.stack(halves, 1)
    if (basis[:, 0] - basis[:, 1]).norm() < 1e-5 * basis.norm():
        return None
    weights = torch.linalg.lstsq(basis, target[:, None]).solution
    if (basis @ weights - target[:, None]).norm() > 1e-2 * target.norm() or float(weights.prod()) >= 0:
        return None
    return int(weights.argmax())


class Recorder:
    """Records one batch of images while a pipeline runs; a context manager around the pipeline's call.

    The pipeline is stopped, by raising `Recorded` through it, when the last wanted call has been made.

    Args:
        pipeline: the pipeline, with a scheduler.
        denoiser: its denoiser.
        images: numbers of the images in the batch, ``[N]``; or what they are for a number of rows.
        steps: number of steps of the trajectory to keep, with all calls that each makes.
        plan: how the pipeline calls its denoiser.
        after_call: called after each denoiser call.
        stop: whether to stop the pipeline; else it goes on to its result.

    Attributes:
        batch: what has been recorded.
        calls: number of denoiser calls made.
        seconds: duration of each call; on a GPU only of the first two.
        timestep: that of the running call if it is one that is kept, else None.
    """

    def __init__(
        self,
        pipeline: Any,
        denoiser: nn.Module,
        images: Tensor | Callable[[int], Tensor],
        steps: int,
        plan: Survey,
        after_call: Callable[[Recorder], None] = lambda recorder: None,
        stop: bool = True,
    ) -> None:
        self.pipeline, self.denoiser, self.plan, self._stop = pipeline, denoiser, plan, stop
        self.images = images if isinstance(images, Tensor) else torch.empty(0, dtype=torch.int64)
        self._numbers = None if isinstance(images, Tensor) else images
        self.batch: Batch | None = None
        self.calls = 0
        self.seconds: list[float] = []
        self._after_call = after_call
        self.timestep: float | None = None
        self._wanted = set(chosen_calls(plan.steps, steps))
        self._predictions: list[Tensor] = []
        self._observers = ExitStack()
        self._began = 0.0

    @property
    def needed(self) -> int:
        """Number of calls up to the last one wanted."""
        return (max(self._wanted) + 1) * self.plan.branches

    @property
    def complete(self) -> bool:
        """Whether all wanted calls are recorded."""
        return self.batch is not None and len(self.batch.calls) == len(self._wanted) * self.plan.branches

    def __enter__(self) -> Recorder:
        self._observers.enter_context(observing({"denoiser": self.denoiser}, self._before, self._after))
        scheduler = self.pipeline.scheduler
        stock = scheduler.step

        @functools.wraps(stock)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._guided(args[0] if args else kwargs["model_output"])
            if self.complete and self._stop:
                raise Recorded
            return stock(*args, **kwargs)

        scheduler.step = step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del self.pipeline.scheduler.step
        self._observers.close()
        if error is None and not self.complete:
            raise InvalidInputError(
                f"{type(self.pipeline).__name__} called its denoiser {self.calls} times for a trajectory of "
                f"{self.plan.calls} calls: it cannot be recorded"
            )
        return kind is Recorded

    def _before(self, call: ModuleCall) -> None:
        where = type(self.pipeline).__name__
        form, inputs = read_call(signature_of(call.module), call.args, call.kwargs, where)
        rows = len(inputs[sample_name(self.denoiser)])
        step, branch = divmod(self.calls, self.plan.branches)
        if self.batch is None:
            self.batch = self._new_batch(rows)
        if step in self._wanted:
            self.plan.check(inputs, rows, form, where)
            self.batch.add(step, inputs, branch)
            self.timestep = float(inputs["timestep"].flatten()[0])
        self._wait_to_be_timed()
        self._began = time.perf_counter()

    def _after(self, call: ModuleCall) -> None:
        self._wait_to_be_timed()
        self.seconds.append(time.perf_counter() - self._began)
        self.timestep = None
        if self.calls < self.plan.branches:
            first = call.output if isinstance(call.output, Tensor) else call.output[0]
            self._predictions.append(first.detach())
        self.calls += 1
        self._after_call(self)

    def _wait_to_be_timed(self) -> None:
        """Let a GPU finish around the first calls, whose durations are looked at."""
        if self.calls < 2 and torch.cuda.is_available():
            torch.cuda.synchronize()

    def _new_batch(self, rows: int) -> Batch:
        if self._numbers is not None:
            self.images = self._numbers(rows)
        images = len(self.images)
        if rows % images:
            raise InvalidInputError(
                f"{type(self.pipeline).__name__} gives its denoiser {rows} rows for {images} images: it cannot be "
                "recorded"
            )
        numbers = self.images.repeat(rows // images)
        return Batch(sample_name(self.denoiser), numbers, shared=frozenset(self.plan.form.shared))

    def _guided(self, guided: Tensor) -> None:
        """Look at what the scheduler is given first, to tell conditional rows from unconditional ones."""
        predictions, self._predictions = self._predictions, []
        if self.batch is None or not predictions or self.calls > self.plan.branches:
            return
        rows, images = len(self.batch.images), len(self.images)
        if len(predictions) == 1 and rows == 2 * images:
            sample = self.batch.inputs[0][self.batch.sample]
            if (
                torch.equal(*sample.chunk(2))
                and (half := conditional_half(predictions[0], guided)) is not None
            ):
                self.batch.conditional = (torch.arange(rows) >= images) == bool(half)
        elif len(predictions) == 2 and rows == images:
            self.batch.conditional_branch = conditional_half(torch.cat(predictions), guided)
