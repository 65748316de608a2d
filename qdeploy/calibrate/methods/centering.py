"""Inputs shifted to the middle of their range, for engines whose integers have no zero point.

What comes out of SiLU or GELU lies between -0.3 and any positive number, so that symmetric codes leave nearly half of
their grid unused. Q(x - m) uses all of it, and the bias gives back what the weight computes from m (Outlier
Suppression+, Wei et al., EMNLP 2023, arXiv 2304.09145, section 3.1). Padding is done before the shift, so that the
border of a convolution stays right. Departures: one m for all channels is the default, since a subtraction of one
number fuses with what comes before; only layers whose range shrinks are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import input_groups
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.recipe.stages import ACTIVATION_SCALES, ROUNDINGS, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

LEAST_GAIN = 0.05  # of the range; less is not worth a subtraction


@dataclass(frozen=True)
class CenterInputs(Stage):
    """Shift the inputs of layers with symmetric codes to the middle of their range.

    Attributes:
        channels: give each channel a shift of its own; otherwise one for the whole tensor.
    """

    name = "center-inputs"
    description = "inputs shifted to the middle of their range, for codes without a zero point"
    paper = "Outlier Suppression+, Wei et al., EMNLP 2023, arXiv 2304.09145"
    spoils = (ROUNDINGS, ACTIVATION_SCALES)

    channels: bool = False

    def run(self, session: Session) -> None:
        """Set the shifts of layers.

        Raises:
            UsageError: activations have a zero point of their own, or no calibrated scale.
        """
        activations = session.recipe.calibrated
        if activations is None or not activations.symmetric:
            raise UsageError(
                f"center-inputs is for calibrated symmetric activations, and they are {session.recipe.activations}"
            )

        def compute() -> None:
            groups = [group for group in input_groups(session) if all(map(can_shift, group))]
            count = 0
            for group, (low, high) in zip(groups, _ranges(session, groups), strict=True):
                shift = middle(low, high, self.channels)
                if shift is not None:
                    count += len(group)
                    for layer in group:
                        layer.shift = shift.to(layer.device)
            say(f"the inputs of {count} of {len(session.layers)} quantized layers are shifted")

        session.once("shifts", compute)


def can_shift(layer: QuantizedLayer) -> bool:
    """Whether a layer's input is quantized, and its padding, if any, is of zeros."""
    inner = layer.inner
    plain = isinstance(inner, nn.Linear) or (
        isinstance(inner, nn.Conv2d)
        and inner.groups == 1
        and inner.padding_mode == "zeros"
        and not isinstance(inner.padding, str)
    )
    return plain and bool(layer.input_quantizers)


def middle(low: Tensor, high: Tensor, channels: bool) -> Tensor | None:
    """[C] the shift that makes a range symmetric; None where that hardly makes it smaller.

    Args:
        low: [C] smallest value of each channel.
        high: [C] largest value.
        channels: whether each channel has its own.
    """
    shift = (low + high) / 2 if channels else ((low.min() + high.max()) / 2).expand_as(low)
    before = torch.maximum(-low, high).max()
    after = torch.maximum(shift - low, high - shift).max()
    return shift.clone() if after < (1 - LEAST_GAIN) * before else None


def _ranges(session: Session, groups: list[list[QuantizedLayer]]) -> list[tuple[Tensor, Tensor]]:
    """[C] least and largest value of each channel of what each group's quantizer reads, in full precision.

    The zeros around a convolution's input count.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def before(call: ModuleCall) -> None:
        layer = call.module
        assert isinstance(layer, QuantizedLayer)
        x = torch.cat(
            [part.movedim(layer.feature_axis, 0).flatten(1) for part in layer.input_parts(call.input)]
        )
        if layer.order is not None:
            x = x[layer.order.argsort()]
        low, high = x.amin(1), x.amax(1)
        if isinstance(layer.inner, nn.Conv2d) and any(layer.inner.padding):
            low, high = low.clamp(max=0), high.clamp(min=0)
        known = found.get(call.name, (low, high))
        found[call.name] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    firsts = {str(number): group[0] for number, group in enumerate(groups)}
    observe_rows(session, firsts, "input ranges", before=before, mode=session.teacher)
    return [found[name] for name in firsts]


METHOD = Method(
    "centering",
    "Outlier Suppression+, Wei et al., EMNLP 2023, arXiv 2304.09145",
    "inputs shifted to the middle of their range; min-max ranges, rounding to nearest",
    (CenterInputs(), WeightRanges("minmax"), ActivationRanges("minmax")),
)
