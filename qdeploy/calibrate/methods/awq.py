"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978): weights that meet large activations are kept precise.

Section 3.2: input channel j of a weight is multiplied by ``s_j`` before it is quantized, and the input is
divided by it. A salient channel then gets finer steps, as long as it does not widen the range that it shares with
its block. Equation 5: ``s_j = mean|X_j|^alpha``, with the alpha between 0 and 1 that has the least error of the
layer's output, ``|Q(W diag(s)) diag(s)^-1 X - W X|^2``; alpha = 0 is rounding to nearest.

Departures: layers that read one tensor share s, chosen for the sum of their errors; 1 / s stays in front of them as a
factor of its own, which engines fuse, instead of being folded into what comes before; weights are not clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import smooth, smoothing_groups
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.ranges import WEIGHT_FINDERS, check_finder
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import RESULTS, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

TOKENS = 1024  # rows of a layer's input that its error is measured on


@dataclass(frozen=True)
class ScaleSalient(Stage):
    """Scale the input channels of linear layers so that their quantized weights serve their inputs best.

    Attributes:
        grid: how many alphas from 0 up to, not including, 1 are tried.
        finder: how the ranges of weights are found in the trials; as the stage that finds them afterwards.
    """

    name = "scale-salient"
    description = "scaling of linear layers' input channels by what their inputs hold"
    paper = "AWQ, Lin et al., MLSys 2024, arXiv 2306.00978"
    spoils = RESULTS

    grid: int = 20
    finder: str = "minmax"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an impossible grid or finder.
        """
        super().__post_init__()
        check_finder(self.finder, WEIGHT_FINDERS)
        if self.grid < 1:
            raise UsageError(f"the grid of scale-salient must be at least 1, not {self.grid}")

    def run(self, session: Session) -> None:
        """Set the smoothing of linear layers."""

        def compute() -> None:
            alphas = []
            for groups in _batches(smoothing_groups(session, linear=True), session.max_memory):
                for group, x in zip(groups, recorded_inputs(session, groups), strict=True):
                    alpha, factors = best_factors(group, x, self.grid, self.finder)
                    alphas += [alpha] * len(group)
                    for layer in group:
                        smooth(layer, factors)
            if alphas:
                mean = sum(alphas) / len(alphas)
                say(
                    f"{len(alphas)} of {len(session.layers)} quantized layers are scaled, alpha {mean:.2f} on average"
                )

        session.once("salient", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return 1.5, 0


def best_factors(group: list[QuantizedLayer], x: Tensor, grid: int, finder: str) -> tuple[float, Tensor]:
    """The alpha of equation 5 and its factors, for layers that read one tensor.

    Args:
        group: the layers; their weight quantizers are left as the last trial set them.
        x: [N, C] inputs.
        grid: how many alphas to try.
        finder: of the weights' ranges.

    Returns:
        Alpha, and [C] factors: 1 for channels that are always 0.
    """
    mean = x.abs().mean(0)
    trials = []
    for step in range(grid):
        alpha = step / grid
        factors = torch.where(mean > 0, mean, 1.0).pow(alpha)
        trials.append((sum(_error(layer, x, factors, finder) for layer in group), alpha, factors))
    _, alpha, factors = min(trials, key=lambda trial: trial[0])
    return alpha, factors


def _error(layer: QuantizedLayer, x: Tensor, factors: Tensor, finder: str) -> float:
    """Squared error of a layer's output for inputs [N, C], its weight scaled and rounded to nearest."""
    before = layer.smoothing
    smooth(layer, factors)
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*WEIGHT_FINDERS[finder](weight, quantizer.format))
    parts = zip(layer.input_parts(x), layer.quantized_weights(), strict=True)
    computed = torch.stack([nn.functional.linear(part, weight) for part, weight in parts]).sum(0)
    exact = nn.functional.linear(x if before is None else x / before, layer.weight)
    layer.smoothing = before
    return float((computed - exact).double().square().sum())


def _batches(groups: list[list[QuantizedLayer]], memory: int) -> Iterator[list[list[QuantizedLayer]]]:
    """Groups whose recorded inputs fit into so many bytes together; one at least."""
    batch: list[list[QuantizedLayer]] = []
    taken = 0
    for group in groups:
        size = 4 * TOKENS * group[0].features
        if batch and taken + size > memory:
            yield batch
            batch, taken = [], 0
        batch.append(group)
        taken += size
    if batch:
        yield batch


def recorded_inputs(session: Session, groups: list[list[QuantizedLayer]]) -> list[Tensor]:
    """[N, C] of what each group reads in full precision: about `TOKENS` rows, evenly from all calls."""
    share = -(-TOKENS // -(-len(session.rows()) // session.effort.batch))
    seen: dict[str, list[Tensor]] = {str(number): [] for number in range(len(groups))}

    def before(call: ModuleCall) -> None:
        tokens = call.input.flatten(0, -2)
        seen[call.name].append(tokens[:: max(1, len(tokens) // share)][:share].float())

    firsts = {str(number): group[0] for number, group in enumerate(groups)}
    observe_rows(session, firsts, "salient channels", before=before, mode=session.teacher)
    return [torch.cat(inputs) for inputs in seen.values()]


METHOD = Method(
    "awq",
    "AWQ, Lin et al., MLSys 2024, arXiv 2306.00978",
    "weights of salient input channels are scaled before they are rounded; min-max ranges",
    (
        ScaleSalient(),
        WeightRanges("minmax"),
        ActivationRanges("minmax"),
    ),
)
