"""The recipe that describes a published network, and which of its layers share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qdeploy.calibrate.published.fit import Fitted
from qdeploy.calibrate.published.layouts import InputGrid
from qdeploy.calibrate.published.place import PublishedSteps
from qdeploy.network.roles import Structure
from qdeploy.recipe.formats import NONE, Format, integer, parse_format, unsigned
from qdeploy.recipe.recipe import Recipe
from qdeploy.recipe.stages import ForeignStage
from qdeploy.recipe.targets import find_target
from qdeploy.system.errors import CapabilityError, UsageError

WIDE = 15  # zero points above this are none of 4 bits
SIXTEEN = 1 / 4096  # steps of a softmax output below this are those of 16 bits


def recipe_of(
    fitted: Fitted,
    structure: Structure,
    method: str,
    weights: str | None,
    activations: str | None,
    target: str | None,
    steps: PublishedSteps,
) -> Recipe:
    """What the file is, in a recipe's words.

    Args:
        fitted: its content.
        structure: the model's.
        method: whose code wrote it.
        weights: their format, if it was given.
        activations: theirs.
        target: what the result must run on, if it was given.
        steps: the timesteps of its scales.

    Raises:
        CapabilityError: no format here has its codes.
        UsageError: it does not say how many bits there are, or the target cannot run it.
    """
    kept = {path: layer for path, layer in fitted.layers.items() if layer.weights}
    grids = [grid for layer in kept.values() for grid in layer.inputs]
    weights = weights or _weight_format(fitted).name
    seen = activations or _input_format(grids).name if grids else NONE
    number_format = parse_format(seen)
    if number_format is not None and number_format.symmetric and method == "quest":
        raise CapabilityError(
            "QuEST's code clamps symmetric activations to [-257, 256] at 8 bits, which no format of 8 bits holds: "
            "import the weights alone with --activations none"
        )
    attention = bool(fitted.attentions)
    moving = fitted.steps > 1 and not steps.merged
    asymmetric = number_format is not None and not number_format.symmetric
    several = any(grid.delta[0].numel() > 1 for grid in grids)
    engine = find_target("openvino")
    able = weights in engine.weights and seen in engine.activations
    simulated = not able or (asymmetric and (attention or moving)) or (several and method == "dgq")
    bare = {path for path, layer in kept.items() if not layer.inputs}
    options = {"method": method}
    return Recipe(
        weights,
        seen,
        method=method if method in ("qdiffusion", "tfmq", "quest", "dgq") else "qdiffusion",
        stages=[ForeignStage("import-checkpoint", options)],
        coverage="qdiffusion-paper" if attention else "every-layer",
        target=target or ("simulated" if simulated else "openvino"),
        exclude=[layer.path for layer in structure.layers if layer.path not in kept],
        layers=tuple((path, {"activations": NONE}) for path in sorted(bare)) if seen != NONE else (),
        timestep_groups=tuple(steps.edges.tolist()) if moving else 1,
        softmax=_softmax_format(fitted) if attention else "uint8",
    )


def _weight_format(fitted: Fitted) -> Format:
    grids = [grid for layer in fitted.layers.values() for grid in layer.weights]
    zero_points = torch.cat([grid.zero_point for grid in grids])
    bits = 8 if float(zero_points.median()) > WIDE else 4
    if not bool(zero_points.any()):
        raise UsageError(
            "the file's weights have no zero points, so the number of bits is unknown: pass --weights int4 or int8"
        )
    return unsigned(bits)


def _input_format(grids: Sequence[InputGrid]) -> Format:
    return unsigned(8) if any(bool(grid.zero_point.any()) for grid in grids) else integer(8)


def _softmax_format(fitted: Fitted) -> str:
    """The format of the softmax output: its steps say whether they are of 8 or of 16 bits."""
    deltas = [
        float(each.operands["probabilities"].delta.max())
        for each in fitted.attentions.values()
        if "probabilities" in each.operands
    ]
    return "uint16" if deltas and max(deltas) < SIXTEEN else "uint8"


def as_published(structure: Structure, fitted: Fitted) -> Structure:
    """The structure with the file's splits; layers that read one tensor with equal scales read it together."""
    first: dict[tuple[object, ...], str] = {}
    layers = []
    for layer in structure.layers:
        found = fitted.layers[layer.path]
        scales = tuple(
            (tuple(grid.delta.flatten().tolist()), tuple(grid.zero_point.flatten().tolist()))
            for grid in found.inputs
        )
        reads = first.setdefault((layer.unit, layer.reads, found.split, scales), layer.path)
        layers.append(replace(layer, split=found.split, reads=reads))
    attentions = tuple(path for path in structure.attentions if path in fitted.attentions)
    return replace(structure, layers=tuple(layers), attentions=attentions)
