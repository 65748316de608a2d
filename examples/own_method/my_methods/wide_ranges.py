"""Ranges with a margin: a stage and a method of our own, found by `qdeploy` as entry points."""

from dataclasses import dataclass

from qdeploy import ActivationRanges, Method, Stage, WeightRanges
from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import quantized_layers
from qdeploy.recipe.stages import ACTIVATION_SCALES


@dataclass(frozen=True)
class Margin(Stage):
    """Widen the range of every layer's input.

    Attributes:
        factor: by how much; 1 changes nothing.
    """

    name = "margin"
    description = "ranges of layers' inputs with a margin"
    needs = (ACTIVATION_SCALES,)
    gives = (ACTIVATION_SCALES,)

    factor: float = 1.05

    def run(self, session: Session) -> None:
        """Multiply the scales."""

        def compute() -> None:
            layers = quantized_layers(session.denoiser).values()
            for quantizer in {each for layer in layers for each in layer.activation_quantizers}:
                quantizer.scale = quantizer.scale * self.factor

        session.once("margin", compute)


METHOD = Method(
    "wide-ranges",
    "an example",
    "percentile ranges with a margin",
    (WeightRanges("lp"), ActivationRanges("percentile"), Margin()),
)
