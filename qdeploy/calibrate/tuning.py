"""Tuning of chosen weights, and of activation scales, against the whole network's prediction.

Rounding stays true to weights that move: a tuned weight is a number of steps on its frozen grid, begins at
the codes that were decided before, is rounded with a straight-through gradient at every step, and its
rounded self is what is kept. The teacher is the same network with its own weights, which nothing here
touches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from qdeploy.calibrate.attention import intercepted
from qdeploy.calibrate.fakequant import QuantizedLayer
from qdeploy.calibrate.operators import code_type, per_channel, round_through
from qdeploy.calibrate.quantizers import ActivationQuantizer, WeightQuantizer
from qdeploy.calibrate.session import Session
from qdeploy.clock import clock_of
from qdeploy.inputs import denoise
from qdeploy.progress import track

SAVE_SECONDS = 60.0  # a stop loses about this much

_Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


class StraightThrough(nn.Module):
    """A weight on a frozen grid, rounded to nearest in every forward pass, with gradient.

    Attributes:
        u: [C, ...] the weight in steps of its channel.
        scale: [C, 1, ...] steps.
        zero_point: [C, 1, ...] codes of zero.
        begun: the codes that it began with.
    """

    scale: Tensor
    zero_point: Tensor
    begun: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        assert quantizer.codes is not None
        self.format = quantizer.format
        self.register_buffer("scale", per_channel(quantizer.scale, quantizer.codes.ndim))
        zero_point = per_channel(quantizer.zero_point, quantizer.codes.ndim)
        self.register_buffer("zero_point", zero_point.to(self.scale.dtype))
        self.register_buffer("begun", quantizer.codes)
        self.u = nn.Parameter(quantizer.codes.to(self.scale.dtype) - self.zero_point)

    def _steps(self) -> Tensor:
        codes = (round_through(self.u) + self.zero_point).clamp(self.format.qmin, self.format.qmax)
        return codes - self.zero_point

    def forward(self) -> Tensor:
        """The rounded weight."""
        return self._steps() * self.scale

    def codes(self) -> Tensor:
        """The rounded weight's codes."""
        return (self._steps() + self.zero_point).detach().to(code_type(self.format))


class Tuning:
    """What is tuned, as parameters that the network computes with.

    Args:
        layers: whose weights and biases are tuned, by path; their codes are decided.
        quantizers: whose scales are tuned, by name.

    Attributes:
        weights: of each layer, its parts in steps of their channels.
        biases: of each layer that has one, what is added to it, in steps of the channel's weight.
        logs: of each quantizer, the logarithm of its scale.
    """

    def __init__(
        self, layers: Mapping[str, QuantizedLayer], quantizers: Mapping[str, ActivationQuantizer]
    ) -> None:
        self.layers, self.quantizers = layers, quantizers
        self.weights = {
            path: [StraightThrough(quantizer) for quantizer, _ in layer.weight_pairs()]
            for path, layer in layers.items()
        }
        self._biases = {path: layer.bias.detach() for path, layer in layers.items() if layer.bias is not None}
        self._steps = {path: layer.weight_pairs()[0][0].scale for path, layer in layers.items()}
        self.biases = {path: nn.Parameter(torch.zeros_like(bias)) for path, bias in self._biases.items()}
        scales = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers.items()}
        self._scales = {name: (scale, scale.log()) for name, scale in scales.items()}
        self.logs = {name: nn.Parameter(begun.clone()) for name, (_, begun) in self._scales.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by name."""
        weights = {
            f"{path}.weight.{part}": grid.u
            for path, grids in self.weights.items()
            for part, grid in enumerate(grids)
        }
        biases = {f"{path}.bias": bias for path, bias in self.biases.items()}
        return {**weights, **biases, **{f"{name}.log": log for name, log in self.logs.items()}}

    def bias(self, path: str) -> Tensor:
        """A layer's bias as it is now."""
        return self._biases[path] + self.biases[path] * self._steps[path]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the student computes with the parameters, and the gradient reaches them."""
        handles = []
        for path, layer in self.layers.items():
            for (quantizer, _), grid in zip(layer.weight_pairs(), self.weights[path], strict=True):
                quantizer.rounding = grid
            if path in self.biases:
                handles.append(layer.register_forward_pre_hook(self._follow_bias(path)))
        for name, log in self.logs.items():
            handles.append(self.quantizers[name].register_forward_pre_hook(_follow(log)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                for quantizer, _ in layer.weight_pairs():
                    quantizer.rounding = None

    def _follow_bias(self, path: str) -> _Hook:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            module.tuned_bias = self.bias(path)

        return before

    def decide(self) -> None:
        """Leave the network with what was learned: codes, tuned weights and biases, scales."""
        with torch.no_grad():
            for path, layer in self.layers.items():
                for (quantizer, _), grid in zip(layer.weight_pairs(), self.weights[path], strict=True):
                    quantizer.codes = grid.codes()
                layer.tuned = _joined(layer, [grid.u * grid.scale for grid in self.weights[path]])
                if path in self.biases:
                    layer.tuned_bias = self.bias(path)
            for name, log in self.logs.items():
                scale, begun = self._scales[name]
                self.quantizers[name].scale = torch.where(log == begun, scale, log.exp())

    def changed_codes(self) -> int:
        """How many codes are others than at the beginning."""
        grids = [grid for parts in self.weights.values() for grid in parts]
        return sum(int((grid.codes() != grid.begun).sum()) for grid in grids)


def _follow(log: nn.Parameter) -> _Hook:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module.scale = log.exp()

    return before


def _joined(layer: QuantizedLayer, parts: list[Tensor]) -> Tensor:
    """The weight whose parts, smoothed and in the order of the quantizers, are given."""
    weight = torch.cat(parts, 1)
    if layer.order is not None:
        weight = torch.empty_like(weight).index_copy(1, layer.order, weight)
    if layer.smoothing is not None:
        weight = weight / layer.smoothing.view(1, -1, *[1] * (weight.ndim - 2))
    return weight


@dataclass
class Losses:
    """What is minimised: ``mean_l L_l * local + L_G * overall``.

    Every term is a squared distance from full precision, relative to the square of full precision, of each
    row: layers of any size count alike, and rows add up over micro-batches.

    Attributes:
        session: the calibration.
        watched: paths of the layers whose outputs are compared.
        local: weight of their mean.
        overall: weight of the network's prediction.
        recompute: compute the activations inside of units again for the gradient, instead of keeping them.
    """

    session: Session
    watched: Sequence[str]
    local: float
    overall: float
    recompute: bool = True

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """The loss on some rows, with gradient."""
        session, inputs = self.session, self.session.inputs(rows)
        watched = self.watched if self.local else ()
        with torch.no_grad(), session.teacher(), outputs_of(session.denoiser, watched) as targets:
            target = denoise(session.denoiser, inputs)
        units = [path for path, layers in session.structure.units.items() if len(layers) > 1]
        repeated = recomputed(session.denoiser, units) if self.recompute else nullcontext()
        with repeated, outputs_of(session.denoiser, watched) as outputs:
            prediction = denoise(session.denoiser, inputs)
        loss = self.overall * relative_error(prediction, target)
        errors = [relative_error(y, z) for y, z in zip(outputs, targets, strict=True)]
        return loss + self.local * torch.stack(errors).mean() if errors else loss

    def judged(self, rows: Sequence[int], batch: int) -> float:
        """``L_G``, the relative squared error of the prediction, on rows that nothing is learned from."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                inputs = self.session.inputs(chosen := rows[start : start + batch])
                with self.session.teacher():
                    target = denoise(self.session.denoiser, inputs)
                error = relative_error(denoise(self.session.denoiser, inputs), target)
                total += float(error) * len(chosen)
        return total / len(rows)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """``mean_rows |y - y_hat|^2 / |y|^2``; shapes [rows, ...]."""
    power = target.flatten(1).square().sum(1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).flatten(1).square().sum(1) / power).mean()


@contextmanager
def outputs_of(denoiser: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Within, outputs of layers are gathered, one for each call, until the network has run once."""
    found: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)

    with ExitStack() as stack:
        for path in paths:
            handle = denoiser.get_submodule(path).register_forward_hook(after)
            stack.callback(handle.remove)
        yield found


@contextmanager
def recomputed(denoiser: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """Within, units keep nothing for the gradient but their inputs (Chen et al. 2016, arXiv 1604.06174).

    The gradient runs when the network's call is over, so each unit takes its timestep along.
    """
    clock = clock_of(denoiser)
    modules = [denoiser.get_submodule(path) for path in units]
    for module in modules:
        stock = module.forward

        def forward(*args: Any, module: nn.Module = module, stock: Any = stock, **kwargs: Any) -> Any:
            now = None if clock is None else clock.now

            def again(*args: Any, **kwargs: Any) -> Any:
                running = clock.at(now) if clock is not None and now is not None else nullcontext()
                with running, intercepted(module):
                    return stock(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        module.__dict__["forward"] = forward
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def journal_of(stage: str) -> str:
    """Under which name a draft keeps how far the learning of a stage has come."""
    return f"{stage}-learning"


def learn(
    session: Session,
    tuning: Tuning,
    loss: Callable[[Sequence[int]], Tensor],
    rows: Sequence[int],
    *,
    steps: int,
    lr: float,
    lr_scales: float,
    micro_batch: int,
) -> None:
    """Adam with a cosine, on rows drawn at random; goes on where an interrupted run of the stage was.

    Args:
        session: the calibration.
        tuning: what is learned; installed.
        loss: mean over rows.
        rows: to learn from.
        steps: optimiser steps.
        lr: learning rate of weights and biases, in steps of their channels.
        lr_scales: learning rate of the logarithms of scales.
        micro_batch: rows whose activations are held at a time; gradients of a batch are added up.
    """
    named = tuning.parameters()
    logs = {id(log) for log in tuning.logs.values()}
    groups = [
        {"params": [p for p in named.values() if (id(p) in logs) is scales], "lr": rate}
        for scales, rate in ((False, lr), (True, lr_scales))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.Adam(groups)
    schedule = [(group, cast(float, group["lr"])) for group in optimizer.param_groups]
    journal = journal_of(session.stage)
    done = _restore(optimizer, named, session.draft.saved(journal))
    saved = time.monotonic()
    for step in track(list(range(done, steps)), session.stage):
        for group, rate in schedule:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        generator = session.generator(session.stage, "step", str(step))
        size = min(session.effort.batch, len(rows))
        chosen = [rows[i] for i in torch.randint(len(rows), (size,), generator=generator).tolist()]
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, size, micro_batch):
            part = chosen[start : start + micro_batch]
            (loss(part) * (len(part) / size)).backward()
        optimizer.step()
        if time.monotonic() - saved >= SAVE_SECONDS and step + 1 < steps:
            session.draft.save(journal, _snapshot(optimizer, named, step + 1))
            saved = time.monotonic()


def _snapshot(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], done: int
) -> dict[str, Tensor]:
    kept = {"done": torch.tensor(done)}
    for name, parameter in named.items():
        kept[f"{name}.value"] = parameter.detach().cpu().clone()
        for key, value in optimizer.state[parameter].items():
            kept[f"{name}.{key}"] = value.detach().cpu().clone()
    return kept


def _restore(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor] | None,
) -> int:
    """Put a snapshot back; returns how many steps had been done."""
    if kept is None:
        return 0
    for name, parameter in named.items():
        with torch.no_grad():
            parameter.copy_(kept[f"{name}.value"])
        state = {key: kept[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq") if f"{name}.{key}" in kept}
        if state:
            moved = {key: value.to(parameter.device) for key, value in state.items()}
            optimizer.state[parameter] = {"step": kept[f"{name}.step"], **moved}
    return int(kept["done"])
