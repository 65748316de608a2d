"""SVDQuant (Li et al., ICLR 2025, arXiv 2411.05007): the largest singular values in a branch of low rank.

Outliers migrate from activations to weights by smoothing (section 4.1). Of the smoothed weight, the product of the
largest singular triplets stays in float, as two low-rank matrices in parallel to the layer (equation 5), and the
residual, whose range is smaller, is quantized (equation 6). The branch reads the input before quantization.

Departures: the residual's rounding is learned where a recipe lists `round-weights` behind this stage; the paper
uses GPTQ. Under a budget ranks differ between layers: singular values are weighted by the mean square of the layer's
input, and the largest gains for their cost are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound, LearnScales
from qdeploy.calibrate.methods.rotation import can_rotate
from qdeploy.calibrate.methods.smoothquant import MigrateOutliers
from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import BRANCHES, SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say


@dataclass(frozen=True)
class LowRank(Stage):
    """Give linear layers and convolutions of one pixel a branch of low rank in float.

    Attributes:
        rank: of every layer's branch; under a budget, the largest.
        budget: multiplications that all branches may add, as a share of those of their layers; ranks then differ
            between layers, down to 0. None gives every layer ``rank``.
    """

    name = "low-rank"
    description = "a part of low rank of each weight stays in float, in a branch parallel to the layer"
    paper = "SVDQuant, Li et al., ICLR 2025, arXiv 2411.05007"
    gives = (BRANCHES,)
    spoils = (*SCALES, BRANCHES)

    rank: int = 32
    budget: float | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: a rank below 1, or a budget that is no share.
        """
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"the rank of low-rank must be at least 1, not {self.rank}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UsageError(f"the budget of low-rank is a share from 0 to 1, not {self.budget:g}")

    def run(self, session: Session) -> None:
        """Set the branches of layers.

        Raises:
            UsageError: a layer has fewer inputs or outputs than the rank.
        """
        layers = {p: q for p, q in quantized_layers(session.denoiser).items() if can_rotate(q)}
        for path, layer in layers.items():
            if self.rank > (most := min(layer.channels, layer.features)):
                raise UsageError(
                    f"a branch of rank {self.rank} is too large for {path}, whose rank is {most}"
                )

        def compute() -> None:
            ranks = dict.fromkeys(layers, self.rank)
            if self.budget is not None:
                macs = {layer.path: layer.macs for layer in session.layers if layer.path in layers}
                power = _input_power(session, layers)
                gains = {path: _energies(layer)[: self.rank] * power[path] for path, layer in layers.items()}
                ranks = spend(
                    gains,
                    {p: macs[p] * _share(q) for p, q in layers.items()},
                    sum(macs.values()) * self.budget,
                )
            for path, layer in layers.items():
                if ranks[path]:
                    split_off(layer, ranks[path])
            count = sum(rank > 0 for rank in ranks.values())
            say(f"{count} of {len(session.layers)} quantized layers have a branch, of rank {_span(ranks)}")

        session.once("branches", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """The decompositions; under a budget, also a pass over the rows."""
        return (1 if self.budget is not None else 0.2), 0


def split_off(layer: QuantizedLayer, rank: int) -> None:
    """Move the largest singular triplets of a layer's smoothed weight into its branch.

    Args:
        layer: without a branch.
        rank: how many; each factor takes the square roots of the singular values.
    """
    u, s, v = torch.linalg.svd(_smoothed(layer).double(), full_matrices=False)
    root = s[:rank].sqrt()
    layer.branch_down = (v[:rank].T * root).float().contiguous()
    layer.branch_up = (u[:, :rank] * root).T.float().contiguous()


def spend(gains: Mapping[str, Tensor], costs: Mapping[str, float], budget: float) -> dict[str, int]:
    """Ranks by layer: the largest gains for their cost, as many as the budget allows.

    Gains of a layer fall, so that taking them in this order is the best choice up to the last one (as for a
    fractional knapsack).

    Args:
        gains: of each further rank, [most], descending.
        costs: of one rank.
        budget: of all costs.
    """
    offers = sorted(
        ((float(gain) / costs[path], path) for path, values in gains.items() for gain in values), reverse=True
    )
    ranks, left = dict.fromkeys(gains, 0), budget
    for _, path in offers:
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    return ranks


def _smoothed(layer: QuantizedLayer) -> Tensor:
    """[O, C] the smoothed weight, whatever rotation comes after."""
    weight = (layer.weight if layer.tuned is None else layer.tuned).detach().flatten(1)
    return weight if layer.smoothing is None else weight * layer.smoothing


def _energies(layer: QuantizedLayer) -> Tensor:
    """Squared singular values of a layer's smoothed weight, descending."""
    values: Tensor = torch.linalg.svdvals(_smoothed(layer).double())
    return values.square()


def _share(layer: QuantizedLayer) -> float:
    """Multiplications of a branch of rank 1, as a share of the layer's."""
    return (layer.channels + layer.features) / (layer.channels * layer.features)


def _input_power(session: Session, layers: Mapping[str, QuantizedLayer]) -> dict[str, float]:
    """Mean square of what each layer reads, summed over its outputs' positions: the weight of its errors."""
    sums: dict[str, float] = {}

    def before(call: ModuleCall) -> None:
        assert isinstance(call.module, QuantizedLayer)
        seen = call.module.smoothed(call.input)
        sums[call.name] = sums.get(call.name, 0.0) + float(seen.double().square().mean())

    observe_rows(session, dict(layers), "input power", before=before, mode=session.teacher)
    return sums


def _span(ranks: Mapping[str, int]) -> str:
    used: Sequence[int] = sorted(rank for rank in ranks.values() if rank)
    if not used:
        return "0"
    return str(used[0]) if used[0] == used[-1] else f"{used[0]} to {used[-1]}"


METHOD = Method(
    "svdquant",
    "SVDQuant, Li et al., ICLR 2025, arXiv 2411.05007",
    "smoothing, a low-rank branch in float, learned rounding of the residual",
    (
        MigrateOutliers(),
        LowRank(),
        WeightRanges("lp"),
        AdaRound(),
        ActivationRanges("lp"),
        LearnScales(),
    ),
)
