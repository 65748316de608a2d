"""The whole network's error and those of chosen layers, with gradient, in bounded memory.

The teacher is the same network with its own weights, which nothing here touches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from qdeploy.calibrate.session import Session
from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import current_timestep_of
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.quant.attention import intercepted


@dataclass
class Losses:
    """What is minimised: ``mean_l L_l * local + L_G * overall``.

    Every term is a squared distance from full precision, relative to the square of full precision, of each
    row: layers of any size have equal weight, and rows add up over micro-batches.

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
        loss = self.overall * relative_squared_error(prediction, target)
        errors = [relative_squared_error(y, z) for y, z in zip(outputs, targets, strict=True)]
        return loss + self.local * torch.stack(errors).mean() if errors else loss

    def judged(self, rows: Sequence[int], batch: int) -> float:
        """``L_G``, the relative squared error of the prediction, on rows that nothing is learned from."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                inputs = self.session.inputs(chosen := rows[start : start + batch])
                with self.session.teacher():
                    target = denoise(self.session.denoiser, inputs)
                error = relative_squared_error(denoise(self.session.denoiser, inputs), target)
                total += float(error) * len(chosen)
        return total / len(rows)


def relative_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """``mean_rows |y - y_hat|^2 / |y|^2``; shapes [rows, ...]."""
    power = target.flatten(1).square().sum(1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).flatten(1).square().sum(1) / power).mean()


@contextmanager
def outputs_of(denoiser: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Within, outputs of layers are gathered, one for each call, until the network has run once."""
    found: list[Tensor] = []

    def after(call: ModuleCall) -> None:
        found.append(call.output)

    with observing({path: denoiser.get_submodule(path) for path in paths}, after=after):
        yield found


@contextmanager
def recomputed(denoiser: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """Within, units keep nothing for the gradient but their inputs (Chen et al. 2016, arXiv 1604.06174).

    The gradient runs when the network's call is over, so each unit takes its timestep along.
    """
    current = current_timestep_of(denoiser)
    modules = [denoiser.get_submodule(path) for path in units]
    for module in modules:
        stock = module.forward

        def forward(*args: Any, module: nn.Module = module, stock: Any = stock, **kwargs: Any) -> Any:
            now = None if current is None else current.now

            def again(*args: Any, **kwargs: Any) -> Any:
                running = current.at(now) if current is not None and now is not None else nullcontext()
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
