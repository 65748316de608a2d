"""Insert quantizers into a network, where a recipe asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from qdeploy.network.current_timestep import attach_clock
from qdeploy.network.roles import Layer, Structure
from qdeploy.quant.attention import AttentionQuantizers, quantize_attention
from qdeploy.quant.layer import QuantizedLayer, quantized_layers, replace_module
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.recipe.coverage import covered, find_coverage, float_inputs
from qdeploy.recipe.formats import BLOCKS, Format, uint8
from qdeploy.recipe.kernel_limits import thin_conv, thin_float_conv, thin_product
from qdeploy.recipe.layer_formats import check_overrides
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.targets import find_target
from qdeploy.system.errors import UsageError


def quantize_structure(denoiser: nn.Module, structure: Structure, recipe: Recipe) -> list[Layer]:
    """Put quantizers where a recipe's coverage wants them.

    Layers of a unit that read the same tensor share their input quantizer.

    Returns:
        The covered layers, in execution order, but those of `left_in_float`.

    Raises:
        UsageError: no layer is left to quantize.
    """
    coverage = find_coverage(recipe.coverage)
    wanted = covered(structure, coverage, recipe.exclude)
    check_overrides(recipe.layers, (layer.path for layer in wanted), recipe.coverage)
    left = left_in_float(denoiser, structure, recipe)
    layers = [layer for layer in wanted if layer.path not in left]
    if left and not layers:
        raise UsageError(f"nothing would be quantized: {_counted(left)}")
    bare = float_inputs(layers, coverage)
    for layer in layers:
        inner = denoiser.get_submodule(layer.path)
        split = layer.split if coverage.split else ()
        weights, own = recipe.formats(layer.path)
        seen = None if layer.path in bare else own
        replace_module(denoiser, layer.path, QuantizedLayer(inner, weights, seen, split))
    share_inputs(denoiser, {layer.path: layer.reads for layer in layers})
    if recipe.attention is not None:
        for path in structure.attentions:
            quantize_attention(denoiser.get_submodule(path), AttentionQuantizers(recipe.attention, uint8))
    set_clock(denoiser)
    return layers


def left_in_float(denoiser: nn.Module, structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Layers of the coverage that the target or the format has no use for: why, by path."""
    coverage = find_coverage(recipe.coverage)
    left = {}
    for layer in covered(structure, coverage, recipe.exclude):
        module = denoiser.get_submodule(layer.path)
        weights, _ = recipe.formats(layer.path)
        if weights is None:
            left[layer.path] = "as the recipe says"
            continue
        reason = _unfit(module, layer if coverage.split else replace(layer, split=()), weights)
        # temporal layers need no kernel: they end in a table
        if not reason and not layer.temporal and not find_target(recipe.target).thin:
            reason = "too thin to gain" if too_thin(module, layer, weights) else ""
        if reason:
            left[layer.path] = reason
    return left


def _unfit(module: nn.Module, layer: Layer, weights: Format | None) -> str:
    """Why a format has no place for a layer's weight; empty if it has."""
    if weights is None or not weights.block:
        return ""
    if not isinstance(module, nn.Linear):
        return "a convolution, and blocks are for linear layers"
    widths = layer.split or (module.in_features,)
    odd = next((width for width in widths if weights.fitting(width) is None), None)
    return "" if odd is None else f"{odd} input features are no whole blocks of {min(BLOCKS)}"


def _counted(left: Mapping[str, str]) -> str:
    return "; ".join(f"{number} layers: {reason}" for reason, number in Counter(left.values()).items())


def set_clock(denoiser: nn.Module) -> None:
    """Let every quantizer of a network know the timestep of the running call."""
    clock = attach_clock(denoiser)
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer):
            module.clock = clock


def too_thin(module: nn.Module, layer: Layer, weights: Format | None = None) -> bool:
    """Whether a layer, or a half of it that is quantized on its own, is too thin to gain."""
    weight = module.get_parameter("weight")
    parts = [(weight.shape[0], inner, *weight.shape[2:]) for inner in layer.split or weight.shape[1:2]]
    if isinstance(module, nn.Linear):
        rows = layer.macs // weight.numel()
        return any(thin_product(part[0], part[1], rows) for part in parts)
    group = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
    if weights is not None and weights.floating:
        return any(thin_float_conv(part, group) for part in parts)
    return any(thin_conv(part, group, layer.first) for part in parts)


def share_inputs(denoiser: nn.Module, reads: dict[str, str]) -> None:
    """Let layers that read one tensor use one input quantizer; ``reads`` maps each to the first of them."""
    layers = quantized_layers(denoiser)
    for path, first in reads.items():
        if first == path or first not in layers or layers[first].split != layers[path].split:
            continue
        if layers[first].formats[1] == layers[path].formats[1] and _quantizes_input(
            layers[first], layers[path]
        ):
            layers[path].input_quantizers = layers[first].input_quantizers


def _quantizes_input(*layers: QuantizedLayer) -> bool:
    return all(len(layer.input_quantizers) for layer in layers)
