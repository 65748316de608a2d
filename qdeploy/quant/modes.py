"""What a quantized network computes: everything, weights alone, nothing of it, or the operators of an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from torch import nn

from qdeploy.network.current_timestep import current_timestep_of
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.dynamic import DynamicQuantizer
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.log_attention import LogQuantizer
from qdeploy.quant.quantizers import ActivationQuantizer, WeightQuantizer


@contextmanager
def full_precision(denoiser: nn.Module) -> Iterator[None]:
    """Within, the network computes exactly as it did before it was quantized."""
    modules = [m for m in denoiser.modules() if isinstance(m, QuantizedLayer | AttentionQuantizers)]
    before = [module.quantized for module in modules]
    for module in modules:
        module.quantized = False
    try:
        yield
    finally:
        for module, quantized in zip(modules, before, strict=True):
            module.quantized = quantized


@contextmanager
def weights_only(denoiser: nn.Module) -> Iterator[None]:
    """Within, weights are quantized and activations are not."""
    modules = [
        m for m in denoiser.modules() if isinstance(m, ActivationQuantizer | LogQuantizer | DynamicQuantizer)
    ]
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def freeze(denoiser: nn.Module) -> None:
    """Switch every quantizer to the operators that export writes; for a network that is only traced.

    An engine has one timestep for all rows, so only the first row's is looked at then.

    Shared quantizers are copied, since a tracer calls a shared tensor by any of its names. The exported
    graph shares them again, under the first name.
    """
    for layer in quantized_layers(denoiser).values():
        layer.input_quantizers = deepcopy(layer.input_quantizers)
        if layer.shift is not None:
            layer.tuned_bias = layer.shifted_bias(layer.quantized_weights())
            layer.bias_holds_shift = True
    current = current_timestep_of(denoiser)
    if current is not None:
        current.single = True
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer | DynamicQuantizer):
            module.freeze()
