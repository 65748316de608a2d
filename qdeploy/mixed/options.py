"""The options of one layer: its weight in some format, or its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.quant.ranges import WEIGHT_FINDERS
from qdeploy.recipe.formats import Format

WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True)
class Option:
    """One way to quantize a layer.

    Attributes:
        part: ``weights`` or ``activations``; the other part stays in float.
        format: name of the format.
    """

    part: str
    format: str


@dataclass(frozen=True)
class LayerOptions:
    """A layer whose options are tried.

    Attributes:
        path: its path.
        layer: the module.
        weights: weight quantizers to try, by format; an empty list leaves the weight in float.
    """

    path: str
    layer: QuantizedLayer
    weights: Mapping[str, nn.ModuleList] = field(default_factory=dict)

    def options(self) -> list[Option]:
        """What can be tried, weights first."""
        inputs = [] if self.layer.table is not None else self.layer.activation_quantizers[:1]
        return [Option(WEIGHTS, name) for name in self.weights] + [
            Option(ACTIVATIONS, quantizer.format.name) for quantizer in inputs
        ]

    @contextmanager
    def trying(self, option: Option) -> Iterator[None]:
        """Within this context the layer computes with one option, independently of the rest of the network."""
        layer, before = self.layer, self.layer.weight_quantizers
        inputs = [(quantizer, quantizer.enabled) for quantizer in layer.activation_quantizers]
        switched_on = layer.quantized
        layer.quantized = True
        layer.weight_quantizers = self.weights[option.format] if option.part == WEIGHTS else nn.ModuleList()
        for quantizer, _ in inputs:
            quantizer.enabled = option.part == ACTIVATIONS
        try:
            yield
        finally:
            layer.quantized, layer.weight_quantizers = switched_on, before
            for quantizer, enabled in inputs:
                quantizer.enabled = enabled


def quantized_to(layer: QuantizedLayer, number_format: Format, finder: str) -> nn.ModuleList:
    """Quantizers of a layer's weight in a format, ranges found and codes rounded to nearest."""
    made = []
    for part in layer.weight_parts():
        quantizer = WeightQuantizer(number_format, part.shape[0], part.shape[1]).to(part.device)
        quantizer.set(*WEIGHT_FINDERS[finder](part, number_format))
        quantizer.codes = quantizer.nearest(part)
        made.append(quantizer)
    return nn.ModuleList(made)
