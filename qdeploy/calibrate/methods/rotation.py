"""Block Hadamard rotations in front of quantizers (ConvRot, arXiv 2512.03673; QuaRot, arXiv 2404.00456).

A Hadamard matrix spreads an outlier over all channels of its block, so that one scale serves them all. It is
multiplied into the weight before quantization, and to the input in front of the quantizer, behind whatever modulates
it: adaptive norms stay as they are. Departure from QuaRot: blocks, so that the product in front of the quantizer is
small, and no rotation is moved through the network, whose norms and gates forbid it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import input_groups
from qdeploy.quant.basis import hadamard
from qdeploy.quant.layer import QuantizedLayer, is_pointwise
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ROTATIONS, SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

SMALLEST = 8  # channels of a block; smaller ones spread little


@dataclass(frozen=True)
class Rotate(Stage):
    """Rotate blocks of the input channels of linear layers and convolutions of one pixel.

    Attributes:
        size: channels of a block, a power of two; layers whose channels it does not divide take the largest smaller
            power of two that does, and stay as they are where that is below 8.
    """

    name = "rotate"
    description = "block Hadamard rotations of layers' inputs and weights"
    paper = "ConvRot, arXiv 2512.03673"
    gives = (ROTATIONS,)
    spoils = SCALES
    rows = False

    size: int = 32

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: the size is no power of two from 8 on.
        """
        super().__post_init__()
        if self.size < SMALLEST or self.size & (self.size - 1):
            raise UsageError(
                f"the size of rotate must be a power of two of at least {SMALLEST}, not {self.size}"
            )

    def run(self, session: Session) -> None:
        """Set the rotation of layers."""

        def compute() -> None:
            count = 0
            for group in input_groups(session):
                size = rotation_size(group[0], self.size)
                if size < SMALLEST or not all(map(can_rotate, group)):
                    continue
                for layer in group:
                    layer.rotation = hadamard(size).to(layer.device)
                count += len(group)
            say(
                f"{count} of {len(session.layers)} quantized layers are rotated, blocks of {self.size} at most"
            )

        session.once("rotations", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """Nothing to speak of."""
        return 0, 0


def can_rotate(layer: QuantizedLayer) -> bool:
    """Whether a layer multiplies its channels by a matrix, token by token or pixel by pixel."""
    return isinstance(layer.inner, nn.Linear) or is_pointwise(layer.inner)


def rotation_size(layer: QuantizedLayer, largest: int) -> int:
    """The largest power of two up to ``largest`` that divides each part of a layer's input channels."""
    size = largest
    while any(part % size for part in layer.split or (layer.features,)):
        size //= 2
    return size


METHOD = Method(
    "rotation",
    "ConvRot, arXiv 2512.03673",
    "block Hadamard rotations of inputs and weights; rounding to nearest",
    (Rotate(), WeightRanges("lp"), ActivationRanges("lp")),
)
