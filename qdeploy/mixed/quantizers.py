"""Quantizers of all layers, set by a recipe's finders or a checkpoint, and those that are tried in their places."""

from __future__ import annotations

from safetensors.torch import load_file

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.session import Session
from qdeploy.mixed.options import LayerOptions, quantized_to
from qdeploy.mixed.request import Work
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.state import code_shapes, write_state
from qdeploy.recipe.formats import parse_format
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.layers import read_layers
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import track


def set_quantizers(session: Session, work: Work) -> None:
    """Find ranges by the recipe's own finders, or take a checkpoint's scales and roundings."""
    if work.checkpoint is not None:
        stored = load_file(work.checkpoint.quantized)
        described = read_layers(work.checkpoint.layers)
        if [layer.path for layer in described.layers] != [layer.path for layer in session.layers]:
            raise InvalidInputError(f"{work.checkpoint.path} quantizes other layers than this version would")
        write_state(session.denoiser, stored, code_shapes(session.denoiser))
        return
    weights, activations = _finders(session.recipe)
    for number, stage in enumerate((WeightRanges(weights), ActivationRanges(activations))):
        session.stage = f"{number}-{stage.name}"
        stage.run(session)


def _finders(recipe: Recipe) -> tuple[str, str]:
    """How a recipe finds the ranges of weights and of activations."""
    ranges = (stage for stage in recipe.stages if isinstance(stage, WeightRanges | ActivationRanges))
    found = {type(stage): stage.finder for stage in ranges}
    return found.get(WeightRanges, WeightRanges.finder), found.get(ActivationRanges, ActivationRanges.finder)


def options_of(session: Session, work: Work) -> list[LayerOptions]:
    """What is tried with each layer, in the order of layers; the quantizers are set."""
    modules = quantized_layers(session.denoiser)
    if work.checkpoint is not None:
        return [
            LayerOptions(layer.path, module, {number_format.name: module.weight_quantizers})
            for layer in session.layers
            for module in [modules[layer.path]]
            for number_format in [module.formats[0]]
            if number_format is not None
        ]
    finder, _ = _finders(session.recipe)
    found = []
    for layer in track(session.layers, "formats of weights"):
        formats = [parse_format(name) for name in work.formats]
        made = {each.name: quantized_to(modules[layer.path], each, finder) for each in formats if each}
        found.append(LayerOptions(layer.path, modules[layer.path], made))
    return found
