"""Watching a pipeline call its denoiser: calls are answered here, and steps of the scheduler are counted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qdeploy.model.call import CallForm, read_call, signature_of
from qdeploy.system.errors import InvalidInputError

Run = Callable[[range], object]  # samples these images with the pipeline


class Recorded(Exception):
    """Raised inside the pipeline to stop it: everything wanted is recorded, nothing need be decoded."""


class Watch:
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


def run_until_recorded(denoiser: nn.Module, run: Run, images: range) -> None:
    """Run until the pipeline is stopped; then it cannot put back the attention processors that it has replaced."""
    before = dict(getattr(denoiser, "attn_processors", {}))
    try:
        with suppress(Recorded):
            run(images)
    finally:
        if before != dict(getattr(denoiser, "attn_processors", {})):
            denoiser.set_attn_processor(before)  # type: ignore[operator]


@contextmanager
def answers(denoiser: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
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
def scheduler_steps(pipeline: Any, after: Callable[[Any], None]) -> Iterator[None]:
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
