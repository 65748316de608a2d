"""Which layers read one tensor.

Two questions have two answers. Layers *read* one tensor if the trace saw the same tensor go into them, within one
unit (`qdeploy.network.roles.Layer.reads`): they share what is done to the tensor itself, such as smoothing. Of these,
layers *quantize it together* if they cut it into the same parts and want the same format: they share a quantizer,
and engines quantize the tensor once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from qdeploy.network.roles import Layer
from qdeploy.quant.layer import QuantizedLayer, quantized_layers

Readers = dict[str, QuantizedLayer]  # layers by path, in the order in which they were given


def by_tensor(denoiser: nn.Module, layers: Iterable[Layer]) -> list[Readers]:
    """Quantized layers that read one tensor, together, in the order of their first layer."""
    modules = quantized_layers(denoiser)
    groups: dict[str, Readers] = {}
    for layer in layers:
        groups.setdefault(layer.reads, {})[layer.path] = modules[layer.path]
    return list(groups.values())


def by_quantizer(layers: Mapping[str, QuantizedLayer]) -> list[Readers]:
    """Layers with quantized inputs, those that share a quantizer together, in the order of their first layer."""
    groups: dict[int, Readers] = {}
    for path, layer in layers.items():
        if layer.input_quantizers:
            groups.setdefault(id(layer.input_quantizers), {})[path] = layer
    return list(groups.values())


def share_quantizers(denoiser: nn.Module, reads: Mapping[str, str]) -> None:
    """Let layers use the input quantizer of the first layer that reads their tensor, if it quantizes it alike.

    Args:
        denoiser: the network.
        reads: the first layer for each layer, by path (see `Layer.reads`).
    """
    layers = quantized_layers(denoiser)
    for path, first_path in reads.items():
        layer, first = layers[path], layers.get(first_path)
        if first is None or first is layer or not (first.input_quantizers and layer.input_quantizers):
            continue
        if (first.split, first.formats[1]) == (layer.split, layer.formats[1]):
            layer.input_quantizers = first.input_quantizers
