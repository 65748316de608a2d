"""Find out how a pipeline calls its denoiser, before anything is recorded.

A trajectory is run once for one image, of which the first denoiser call alone is computed: every later call answers
with the same prediction. That tells in seconds how many steps the trajectory has, how many calls each step makes
(guidance can take a call for each branch), which arguments are tensors and which are constants, and whether a call
can be repeated from what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibration_set.timestep_range import timestep_range
from qdeploy.calibration_set.watch import Recorded, Run, Watch, answers, run_until_recorded, scheduler_steps
from qdeploy.model.call import CallForm, read_call, settle, signature_of
from qdeploy.model.inputs import attach_form, denoise, form_of
from qdeploy.store.facts import CallFacts, RangeFacts
from qdeploy.system.errors import InvalidInputError


@dataclass(frozen=True)
class Survey:
    """How a pipeline calls its denoiser.

    Attributes:
        form: of every call.
        steps: number of steps of the trajectory that call the denoiser.
        branches: number of calls in each of them.
        timesteps: of each step's first call, in the order of sampling.
        layout: dtype and shape of each tensor; the shape without the axis of rows, where there is one.
        timestep_range: of the network (see `qdeploy.calibration_set.timestep_range.timestep_range`).
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
    watch = Watch(pipeline, denoiser, where, keep)
    with scheduler_steps(pipeline, watch.end_of_step), answers(denoiser, watch.answer):
        run_until_recorded(denoiser, run, range(1))
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

    with answers(denoiser, peek):
        run_until_recorded(denoiser, run, range(2))
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


def _replay(denoiser: nn.Module, form: CallForm, watch: Watch, where: str) -> None:
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
