"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438): outliers migrate from activations to weights.

Its equation 4: ``S_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` for each input channel j. Departure: S stays in
front of the layer as a factor of its own instead of being folded into what comes before, which here may be
an activation function; engines fuse it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.rounding_noise import relative_noise
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import relative_factors, smooth, smoothing_groups
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.recipe.stages import RESULTS, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

LAYERS = ("linear", "all")


@dataclass(frozen=True)
class MigrateOutliers(Stage):
    """Smooth layers by the ranges of their inputs and weights (section 4).

    Attributes:
        alpha: how much of the difficulty migrates from activations to weights, 0 to 1.
        search: how many alphas from 0 to 1 are tried instead, for each group of layers that read one tensor, by the
            estimated rounding noise of their outputs; None takes ``alpha`` for all.
        layers: ``linear``, or ``all`` for convolutions too.
    """

    name = "migrate-outliers"
    description = "smoothing of layers by the ranges of their input channels"
    paper = "SmoothQuant, Xiao et al., ICML 2023, arXiv 2211.10438"
    spoils = RESULTS

    alpha: float = 0.5
    layers: str = "linear"
    search: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an impossible alpha or word.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"the alpha of migrate-outliers must be from 0 to 1, not {self.alpha}")
        if self.layers not in LAYERS:
            raise UsageError(f"migrate-outliers smooths {' or '.join(LAYERS)}, not {self.layers!r}")
        if self.search is not None and self.search < 2:
            raise UsageError(f"the search of migrate-outliers tries 2 alphas or more, not {self.search}")

    def run(self, session: Session) -> None:
        """Set the smoothing of layers."""

        def compute() -> None:
            groups = smoothing_groups(session, linear=self.layers == "linear")
            alphas = []
            for group, seen in zip(groups, _channel_spreads(session, groups), strict=True):
                weights = torch.stack([weight_ranges(layer) for layer in group]).amax(0)
                alpha = best_alpha(group, seen, weights, self.search) if self.search else self.alpha
                alphas.append(alpha)
                factors = migration_factors(seen.reach.to(weights.device), weights, alpha)
                for layer in group:
                    smooth(layer, factors)
            count, mean = sum(map(len, groups)), sum(alphas) / max(1, len(alphas))
            say(
                f"{count} of {len(session.layers)} quantized layers are smoothed, alpha {mean:g}"
                if not self.search
                else f"{count} of {len(session.layers)} quantized layers are smoothed, alpha {mean:.2f} on average"
            )

        session.once("smoothing", compute)


def migration_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """S of equation 4; 1 for channels that are always 0, or that no output reads.

    Args:
        activations: [C] max |X_j|.
        weights: [C] max |W_j|.
        alpha: the migration strength.
    """
    factors = activations.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((activations > 0) & (weights > 0), factors, 1.0)


def weight_ranges(layer: QuantizedLayer) -> Tensor:
    """[C] max |W_j| over the outputs that read input channel j."""
    return layer.student.detach().abs().transpose(0, 1).flatten(1).amax(1)


@dataclass
class ChannelSpreads:
    """What the channels of a tensor hold, over all rows: [C] smallest and largest value, and mean square."""

    low: Tensor
    high: Tensor
    square: Tensor

    @property
    def reach(self) -> Tensor:
        """[C] max |X_j|."""
        return torch.maximum(-self.low, self.high)


def best_alpha(group: list[QuantizedLayer], seen: ChannelSpreads, weights: Tensor, search: int) -> float:
    """The alpha out of ``search`` from 0 to 1 with the least `relative_noise` of layers that read one tensor.

    Args:
        group: the layers.
        seen: of what they read.
        weights: [C] max |W_j| over all of them.
        search: 2 or more.
    """
    trials = []
    for step in range(search):
        alpha = step / (search - 1)
        factors = relative_factors(migration_factors(seen.reach, weights.cpu(), alpha))
        trials.append((relative_noise(group, seen.low, seen.high, seen.square, factors), alpha))
    return min(trials)[1]


def _channel_spreads(session: Session, groups: list[list[QuantizedLayer]]) -> list[ChannelSpreads]:
    """Of what each group reads, over the calibration rows in full precision, as smoothed so far."""
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    counts: dict[str, int] = {}

    def before(call: ModuleCall) -> None:
        assert isinstance(call.module, QuantizedLayer)
        x = call.input.movedim(call.module.feature_axis, 0).flatten(1)
        low, high, square = x.amin(1), x.amax(1), x.double().square().sum(1)
        if call.name in found:
            lows, highs, squares = found[call.name]
            low, high, square = torch.minimum(low, lows), torch.maximum(high, highs), square + squares
        found[call.name] = low, high, square
        counts[call.name] = counts.get(call.name, 0) + x.shape[1]

    firsts = {str(number): group[0] for number, group in enumerate(groups)}
    observe_rows(session, firsts, "channel ranges", before=before, mode=session.teacher)
    spreads = []
    for number, group in enumerate(groups):
        low, high, square = found[str(number)]
        factors = torch.ones_like(low) if group[0].smoothing is None else group[0].smoothing
        mean = (square / counts[str(number)]).float() / factors.square()
        spreads.append(ChannelSpreads(*(part.cpu() for part in (low / factors, high / factors, mean))))
    return spreads


METHOD = Method(
    "smoothquant",
    "SmoothQuant, Xiao et al., ICML 2023, arXiv 2211.10438",
    "outliers of activations migrate to weights; min-max ranges",
    (
        MigrateOutliers(),
        WeightRanges("minmax"),
        ActivationRanges("minmax"),
    ),
)
