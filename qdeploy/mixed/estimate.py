"""The cheap pass: the first-order effect of each layer's own error on the prediction.

A layer's output moves by e when the layer is quantized; to first order the prediction then moves by J e, J the
Jacobian from this layer to the prediction. For noise v with unit covariance E[(v^T J e)^2] = ||J e||^2, and J^T v
is the result of one backward pass, for all layers together (Hutchinson's estimator; the sum of squared
gradients times errors is a Fisher-weighted error, as in HAWQ and BRECQ). All options of all layers cost a few
passes instead of one each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibrate.session import Session
from qdeploy.mixed.options import LayerOptions
from qdeploy.mixed.rows import TimestepRows, row_powers
from qdeploy.model.inputs import denoise
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.system.progress import track

BATCH = 8  # rows whose activations of all layers are kept for the backward passes
_InputOutput = tuple[Tensor, Tensor]


def first_order(
    session: Session, rows: TimestepRows, subjects: Sequence[LayerOptions], probes: int
) -> list[Tensor]:
    """Estimates of what `qdeploy.mixed.measure.Exact.noise` measures.

    Args:
        session: the network, its quantizers set.
        rows: what to estimate on.
        subjects: the layers.
        probes: backward passes for each row.

    Returns:
        For each layer [options, T] noise by signal.
    """
    noise = [torch.zeros(len(subject.options()), len(rows.numbers)).double() for subject in subjects]
    signal = torch.zeros(len(rows.numbers)).double()
    generator = session.generator("sensitivity probes")
    for start in track(range(0, len(rows.numbers), BATCH), "first order"):
        numbers = rows.numbers[start : start + BATCH]
        place = slice(start, start + len(numbers))
        with session.teacher():
            with _recorded([subject.layer for subject in subjects]) as calls:
                prediction = denoise(session.denoiser, session.inputs(numbers))
            signal[place] = row_powers(prediction.detach())
            errors = [_errors(subject, calls[id(subject.layer)]) for subject in subjects]
        outputs = [output for subject in subjects for _, output in calls[id(subject.layer)]]
        for probe in range(probes):
            direction = torch.randn(prediction.shape, generator=generator).to(prediction)
            keep = probe + 1 < probes
            gradients: Iterator[Any] = iter(
                torch.autograd.grad(prediction, outputs, direction, retain_graph=keep, allow_unused=True)
            )
            for number, moved in enumerate(errors):
                noise[number][:, place] += _moved(moved, gradients, len(numbers)).square() / probes
    total = rows.by_timestep(signal)
    return [torch.stack([rows.by_timestep(row) for row in each]) / total for each in noise]


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[dict[int, list[_InputOutput]]]:
    """Inputs and outputs of every call of some layers; the outputs have gradients."""
    calls: dict[int, list[_InputOutput]] = {id(layer): [] for layer in layers}
    anchor = torch.zeros((), requires_grad=True)

    def after(call: ModuleCall) -> Tensor:
        output: Tensor = call.output if call.output.requires_grad else call.output + anchor.to(call.output)
        calls[id(call.module)].append((call.input, output))
        return output

    observed = {str(number): layer for number, layer in enumerate(layers)}
    with torch.enable_grad(), observing(observed, after=after):
        yield calls


def _errors(subject: LayerOptions, calls: Sequence[_InputOutput]) -> list[list[Tensor]]:
    """For every option the errors of every call's output."""
    errors = []
    for option in subject.options():
        with subject.trying(option), torch.no_grad():
            errors.append([subject.layer(x) - output.detach() for x, output in calls])
    return errors


def _moved(errors: list[list[Tensor]], gradients: Iterator[Any], rows: int) -> Tensor:
    """[options, rows] how far each row's prediction moves along the probe; the calls' gradients are taken."""
    calls = len(errors[0]) if errors else 0
    moved = torch.zeros(len(errors), rows).double()
    for call in range(calls):
        gradient = next(gradients)
        if gradient is None:
            continue
        for number, option in enumerate(errors):
            product = (gradient * option[call]).double().cpu()
            # A layer that is shared by all rows, such as the timestep's embedding, affects each row equally.
            own = product.shape[0] % rows == 0
            moved[number] += product.reshape(rows, -1).sum(1) if own else product.sum() / rows
    return moved
