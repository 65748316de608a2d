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
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import smooth, smoothing_groups
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
        layers: ``linear``, or ``all`` for convolutions too.
    """

    name = "migrate-outliers"
    description = "smoothing of layers by the ranges of their input channels"
    paper = "SmoothQuant, Xiao et al., ICML 2023, arXiv 2211.10438"
    spoils = RESULTS

    alpha: float = 0.5
    layers: str = "linear"

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

    def run(self, session: Session) -> None:
        """Set the smoothing of layers."""

        def compute() -> None:
            groups = smoothing_groups(session, linear=self.layers == "linear")
            seen = _channel_ranges(session, groups)
            for group, activations in zip(groups, seen, strict=True):
                weights = torch.stack([weight_ranges(layer) for layer in group]).amax(0)
                factors = migration_factors(activations, weights, self.alpha)
                for layer in group:
                    smooth(layer, factors)
            count = sum(map(len, groups))
            say(f"{count} of {len(session.layers)} quantized layers are smoothed, alpha {self.alpha:g}")

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


def _channel_ranges(session: Session, groups: list[list[QuantizedLayer]]) -> list[Tensor]:
    """[C] max |X_j| of what each group reads, over the calibration rows in full precision."""
    highs: dict[str, Tensor] = {}

    def before(call: ModuleCall) -> None:
        assert isinstance(call.module, QuantizedLayer)
        high = call.input.abs().movedim(call.module.feature_axis, 0).flatten(1).amax(1)
        highs[call.name] = torch.maximum(highs.get(call.name, high), high)

    firsts = {str(number): group[0] for number, group in enumerate(groups)}
    observe_rows(session, firsts, "channel ranges", before=before, mode=session.teacher)
    found = []
    for number, group in enumerate(groups):
        high, smoothing = highs[str(number)], group[0].smoothing
        found.append(high if smoothing is None else high / smoothing)
    return found


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
