"""Insert quantizers into a network, where a recipe asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from qdeploy.network.current_timestep import attach_current_timestep
from qdeploy.network.roles import Layer, Structure
from qdeploy.quant.attention import AttentionQuantizers, quantize_attention
from qdeploy.quant.layer import (
    QuantizedLayer,
    is_pointwise,
    quantized_layers,
    replace_module,
)
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.shared_inputs import share_quantizers
from qdeploy.recipe.coverage import covered, find_coverage, float_inputs
from qdeploy.recipe.exclusions import check_exclude
from qdeploy.recipe.formats import BLOCKS, Format, blocked, parse_format
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
        UsageError: no layer is left to quantize, or a pattern of the recipe matches none.
    """
    coverage = find_coverage(recipe.coverage)
    every = [layer.path for layer in structure.layers]
    check_exclude(recipe.exclude, every, [layer.path for layer in covered(structure, coverage)])
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
        weights, own = layer_formats(inner, replace(layer, split=split), recipe)
        seen = None if layer.path in bare else own
        replace_module(denoiser, layer.path, QuantizedLayer(inner, weights, seen, split))
    share_quantizers(denoiser, {layer.path: layer.reads for layer in layers})
    share_dynamic_group(denoiser, recipe)
    if recipe.attention is not None:
        for path in structure.attentions:
            quantize_attention(
                denoiser.get_submodule(path), AttentionQuantizers(recipe.attention, recipe.probabilities)
            )
    share_current_timestep(denoiser)
    return layers


def left_in_float(denoiser: nn.Module, structure: Structure, recipe: Recipe) -> dict[str, str]:
    """Layers of the coverage that the target or the format has no use for: why, by path."""
    coverage = find_coverage(recipe.coverage)
    left = {}
    for layer in covered(structure, coverage, recipe.exclude):
        module = denoiser.get_submodule(layer.path)
        seen = layer if coverage.split else replace(layer, split=())
        weights, _ = layer_formats(module, seen, recipe)
        if weights is None:
            asked, _ = recipe.formats(layer.path)
            left[layer.path] = _unfit(module, seen, asked, recipe.target) or "as the recipe says"
            continue
        reason = ""
        # temporal layers need no kernel: they end in a table
        if not layer.temporal and not find_target(recipe.target).thin:
            reason = "too thin to gain" if too_thin(module, layer, weights) else ""
        if reason:
            left[layer.path] = reason
    return left


def layer_formats(module: nn.Module, layer: Layer, recipe: Recipe) -> tuple[Format | None, Format | None]:
    """The formats of a layer's weight and input, by the recipe and by what fits the layer.

    Where blocks do not fit, these are the recipe's ``unblocked`` format and float; with nvfp4 twice the former.
    """
    weights, activations = recipe.formats(layer.path)
    if weights is not None and _unfit(module, layer, weights, recipe.target):
        other = parse_format(recipe.unblocked)
        return other, other if weights.two_levels else None
    return weights, activations


def _unfit(module: nn.Module, layer: Layer, weights: Format | None, target: str) -> str:
    """Why a format has no place for a layer's weight; empty if it has."""
    if weights is None or not weights.block:
        return ""
    pointwise = is_pointwise(module) and find_target(target).pointwise
    if not (isinstance(module, nn.Linear) or pointwise):
        return "a convolution, and blocks are for linear layers"
    able = find_target(target).weights
    widths = layer.split or tuple(module.get_parameter("weight").shape[1:2])
    fitting = {width: weights.fitting(width) for width in widths}
    odd = next((width for width, found in fitting.items() if found is None or found.name not in able), None)
    sizes = [block for block in BLOCKS if blocked(weights.bits, block).name in able]
    sizes = [weights.block] if weights.two_levels else sizes
    return "" if odd is None else f"{odd} input features are no whole blocks of {min(sizes)}"


def share_dynamic_group(denoiser: nn.Module, recipe: Recipe) -> None:
    """Let all dynamic quantizers have groups of one size: that of the smallest block, as OpenVINO has one for all.

    ONNX Runtime takes each layer's own block, and so does its target.
    """
    found = [layer.dynamic for layer in quantized_layers(denoiser).values() if layer.dynamic is not None]
    if found and recipe.target != "onnxruntime":
        group = min(quantizer.group for quantizer in found)
        for quantizer in found:
            quantizer.group = group


def _counted(left: Mapping[str, str]) -> str:
    return "; ".join(f"{number} layers: {reason}" for reason, number in Counter(left.values()).items())


def share_current_timestep(denoiser: nn.Module) -> None:
    """Let every quantizer of a network know the timestep of the running call."""
    current = attach_current_timestep(denoiser)
    for module in denoiser.modules():
        if isinstance(module, ActivationQuantizer):
            module.current_timestep = current


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
