"""Find out how a pipeline calls its denoiser, before anything is recorded.

A trajectory is run once for one image, of which the first denoiser call alone is computed: every later call answers
with the same prediction. That tells in seconds how many steps the trajectory has, how many calls each step makes
(guidance can take a call for each branch), which arguments are tensors and which are constants, and whether a call
can be repeated from what is recorded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qdeploy.calibration_set.timestep_range import timestep_range
from qdeploy.model.call import CallForm, read_call, settle, signature_of
from qdeploy.model.inputs import attach_form, denoise, form_of
from qdeploy.store.facts import CallFacts, RangeFacts
from qdeploy.system.errors import InvalidInputError

Run = Callable[[range], object]  # samples these images with the pipeline


class Recorded(Exception):
    """Raised inside the pipeline to stop it: everything wanted is recorded, nothing need be decoded."""


@dataclass(frozen=True)
class Survey:
    """How a pipeline calls its denoiser.

    Attributes:
        form: of every call.
        steps: number of steps of the trajectory that call the denoiser.
        branches: number of calls in each of them.
        timesteps: of each step's first call, in the order of sampling.
        layout: dtype and shape of each tensor; the shape without the axis of rows, where there is one.
        timestep_range: of the network, as of `qdeploy.calibration_set.timestep_range.timestep_range`.
        seconds: that one computed call took, for one image.
        rows: of the denoiser's first call.
        images: of the sample that the scheduler is given; those of the call if it is never asked.
        examples: inputs of the first calls; later ones than the first are not those of a real trajectory.
    """

    form: CallForm
    steps: int
    branches: int
    timesteps: tuple[float, ...]
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    timestep_range: RangeFacts | None
    seconds: float
    rows: int = 1
    images: int = 1
    examples: Sequence[Mapping[str, Tensor]] = ()

    @property
    def calls(self) -> int:
        """Number of calls in the whole trajectory."""
        return self.steps * self.branches

    @property
    def facts(self) -> CallFacts | None:
        """The form as artifacts hold it."""
        return None if self.saved_form is None else self.saved_form.to_facts()

    @property
    def saved_form(self) -> CallForm | None:
        """The form where an artifact has to say it; None for calls that are plain."""
        return None if self.form.plain else self.form

    def example_rows(self) -> dict[str, Tensor]:
        """A row of each example, as inputs of a probe: ``[examples, ...]`` each, what is shared repeated."""
        rows: dict[str, list[Tensor]] = {}
        for number, tensors in enumerate(self.examples):
            for name, value in tensors.items():
                if name == "timestep":
                    row = value.flatten()[number % value.numel()]
                else:
                    row = value if name in self.form.shared else value[number % len(value)]
                rows.setdefault(name, []).append(row)
        return {name: torch.stack(values) for name, values in rows.items()}

    def check(self, tensors: Mapping[str, Tensor], rows: int, form: CallForm, where: str) -> None:
        """Make sure that a call is of this form.

        Raises:
            InvalidInputError: it has other constants, or tensors of other shapes.
        """
        if difference := self.form.difference(form, rows):
            raise InvalidInputError(
                f"{where} calls its denoiser with {difference}: what is no tensor has to be the same in all calls"
            )
        for name, (dtype, shape) in self.layout.items():
            found = tensors[name]
            own = found.shape if name in self.form.shared else found.shape[1:]
            if name != "timestep" and (found.dtype != dtype or tuple(own) != shape):
                raise InvalidInputError(
                    f"{where} calls its denoiser with {name!r} as {_described(found.dtype, own)}, and as "
                    f"{_described(dtype, shape)} in other calls: a graph has one shape; where it is the length of "
                    "prompts that differs, use prompts of one length"
                )


def survey(pipeline: Any, denoiser: nn.Module, run: Run, keep: int = 0) -> Survey:
    """Watch a pipeline make one image, with the first denoiser call alone computed.

    Args:
        pipeline: the pipeline, with a scheduler.
        denoiser: its denoiser.
        run: samples images with these numbers.
        keep: inputs of how many calls to keep as examples, the first ones.

    Raises:
        InvalidInputError: it does not call the denoiser, or in a way that a calibration set cannot hold.
    """
    where = type(pipeline).__name__
    watch = _Watch(pipeline, denoiser, where, keep)
    _until_recorded = functools.partial(_run_until_recorded, denoiser)
    with _scheduler_steps(pipeline, watch.end_of_step), _forward(denoiser, watch.answer):
        _until_recorded(run, range(1))
    steps = watch.steps
    if not steps:
        raise InvalidInputError(
            f"{where} did not call the denoiser that it was given: nothing of it can be calibrated or sampled"
        )
    peeked: list[tuple[CallForm, dict[str, Tensor], int]] = []

    def peek(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        form, tensors = read_call(signature_of(denoiser), args, kwargs, where)
        peeked.append((form, tensors, len(watch.sample_of(tensors))))
        raise Recorded

    with _forward(denoiser, peek):
        _until_recorded(run, range(2))
    form = settle([*watch.first, *peeked])
    branches = {len(step) for step in steps}
    if len(branches) > 1:
        counts = " or ".join(map(str, sorted(branches)))
        raise InvalidInputError(f"{where} calls its denoiser {counts} times a step: it cannot be recorded")
    first = watch.first[0][1]
    layout = {
        name: (tensor.dtype, tuple(tensor.shape if name in form.shared else tensor.shape[1:]))
        for name, tensor in first.items()
    }
    timesteps = tuple(step[0] for step in steps)
    limits = timestep_range(pipeline.scheduler, timesteps)
    found = Survey(
        form,
        len(steps),
        branches.pop(),
        timesteps,
        layout,
        limits,
        watch.seconds,
        watch.rows,
        watch.images or watch.rows,
        watch.kept,
    )
    for other, tensors, rows in watch.distinct:
        found.check(tensors, rows, other, where)
    watch.check_shared(form)
    _replay(denoiser, form, watch, where)
    return found


class _Watch:
    """Answers denoiser calls, and keeps what tells one from another."""

    def __init__(self, pipeline: Any, denoiser: nn.Module, where: str, keep: int) -> None:
        self.pipeline, self.denoiser, self.where, self.keep = pipeline, denoiser, where, keep
        self.kept: list[dict[str, Tensor]] = []
        self.signature = signature_of(denoiser)
        self.calls: list[
            tuple[float, int]
        ] = []  # timestep of each call, and how often the scheduler had stepped
        self.first: list[tuple[CallForm, dict[str, Tensor], int]] = []
        self.distinct: list[tuple[CallForm, dict[str, Tensor], int]] = []
        self.prediction: Tensor | None = None
        self.seconds = 0.0
        self._answers: dict[str, Any] = {}
        self._processors = _processor_kinds(denoiser)
        self._unshared: dict[str, Tensor] = {}
        self.changing: set[str] = set()
        self._scheduler_steps = 0
        self.images = 0

    @property
    def rows(self) -> int:
        """Rows of the first call."""
        return self.first[0][2]

    @property
    def steps(self) -> list[list[float]]:
        """Timesteps of the calls of each step. Where the scheduler never steps, each timestep is a step."""
        grouped: dict[float, list[float]] = {}
        for t, number in self.calls:
            grouped.setdefault(number if self._scheduler_steps else t, []).append(t)
        return list(grouped.values())

    def sample_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The noisy sample among the tensors of a call."""
        name = next(iter(self.signature.parameters))
        if name not in tensors or not tensors[name].ndim:
            raise InvalidInputError(
                f"{self.where} gives its denoiser the sample as no tensor with rows: it cannot be recorded"
            )
        return tensors[name]

    def answer(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network's answer to the first call of its kind, again and again."""
        form, tensors = read_call(self.signature, args, kwargs, self.where)
        rows = len(self.sample_of(tensors))
        if _processor_kinds(self.denoiser) != self._processors:
            raise InvalidInputError(
                f"{self.where} replaces the attention of its denoiser while it samples, as perturbed attention and "
                "self-attention guidance do: a graph cannot follow, so use the pipeline without it"
            )
        if "timestep" not in tensors:
            raise InvalidInputError(f"{self.where} gives its denoiser no timestep: it cannot be recorded")
        if tensors["timestep"].numel() not in (1, rows):
            raise InvalidInputError(
                f"the timestep has shape {list(tensors['timestep'].shape)}: one t per row is needed"
            )
        self.calls.append((float(tensors["timestep"].flatten()[0]), self._scheduler_steps))
        if len(self.kept) < self.keep:
            self.kept.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            known = self._unshared.setdefault(name, tensor)
            if known is not tensor and (known.shape != tensor.shape or not torch.equal(known, tensor)):
                self.changing.add(name)
        key = repr((form.arguments, [(name, x.dtype, x.shape) for name, x in tensors.items()]))
        if key not in self._answers:
            kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            began = time.perf_counter()
            with torch.no_grad():
                output = stock(*args, **kwargs)
            self.seconds = self.seconds or time.perf_counter() - began
            self.distinct.append((form, kept, rows))
            if not self.first:
                self.first.append((form, kept, rows))
                self.prediction = _prediction(output, self.where).detach().clone()
            self._answers[key] = output
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._answers[key])

    def end_of_step(self, sample: Any) -> None:
        """The scheduler has been called."""
        self._scheduler_steps += 1
        self.images = self.images or (len(sample) if isinstance(sample, Tensor) and sample.ndim else 0)
        if len(self.steps) >= len(self.pipeline.scheduler.timesteps):
            raise Recorded

    def check_shared(self, form: CallForm) -> None:
        """What has no rows must not change: rows of several calls are mixed later."""
        if changed := sorted(self.changing & set(form.shared)):
            raise InvalidInputError(
                f"{self.where} gives its denoiser {changed[0]!r} without an axis for the rows, and changes it "
                "from call to call: it cannot be recorded"
            )


def _processor_kinds(denoiser: nn.Module) -> dict[str, type]:
    """Classes of a network's attention processors by name."""
    found = getattr(denoiser, "attn_processors", {})
    return {name: type(processor) for name, processor in found.items()}


def _prediction(output: Any, where: str) -> Tensor:
    tensors = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
    if len(tensors) != 1:
        raise InvalidInputError(
            f"the denoiser of {where} answers with {len(tensors)} tensors: a prediction of one is needed"
        )
    return tensors[0]


def _plain(output: Any) -> Any:
    return list(output.values()) if isinstance(output, Mapping) else output


def _replay(denoiser: nn.Module, form: CallForm, watch: _Watch, where: str) -> None:
    """Repeat the first call from its tensors and constants.

    Raises:
        InvalidInputError: the answer is another one, so that something is missing.
    """
    before = form_of(denoiser)
    attach_form(denoiser, form)
    try:
        with torch.no_grad():
            again = denoise(denoiser, watch.first[0][1])
    finally:
        attach_form(denoiser, before)
    assert watch.prediction is not None
    if again.shape != watch.prediction.shape or not torch.equal(
        again.nan_to_num(), watch.prediction.nan_to_num()
    ):
        raise InvalidInputError(
            f"the first call of {where}, repeated with what was recorded of it, gives another prediction: something "
            "besides the arguments of the call changes what the denoiser computes"
        )


def _described(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _run_until_recorded(denoiser: nn.Module, run: Run, images: range) -> None:
    """Run until the pipeline is stopped; then it cannot put back the attention processors that it has replaced."""
    before = dict(getattr(denoiser, "attn_processors", {}))
    try:
        with suppress(Recorded):
            run(images)
    finally:
        if before != dict(getattr(denoiser, "attn_processors", {})):
            denoiser.set_attn_processor(before)  # type: ignore[operator]


@contextmanager
def _forward(denoiser: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Within, ``answer`` is called with the network's own ``forward`` and the arguments."""
    stock = denoiser.forward
    own = denoiser.__dict__.get("forward")

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(stock, *args, **kwargs)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if own is not None:
            denoiser.forward = own


@contextmanager
def _scheduler_steps(pipeline: Any, after: Callable[[Any], None]) -> Iterator[None]:
    """Within, ``after`` is called after each step of the pipeline's scheduler, with the sample it was given."""
    scheduler = pipeline.scheduler
    stock = scheduler.step

    @functools.wraps(stock)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        after(kwargs["sample"] if "sample" in kwargs else args[2] if len(args) > 2 else None)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
