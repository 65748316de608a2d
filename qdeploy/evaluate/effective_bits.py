"""The effective bit widths of a checkpoint: one that is called W4A8 may multiply mostly floats.

Every multiplication of a denoiser call is counted with the bits of its two operands. A layer that was left in
float, and an attention product that was, count with 32 bits; a layer whose output is looked up in a table of
temporal features multiplies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdeploy.quant.checkpoint import formats_as_described
from qdeploy.recipe.formats import Format, parse_format
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Checkpoint
from qdeploy.store.layers import read_layers
from qdeploy.store.tensors import open_tensors

FLOAT_BITS = 32


@dataclass(frozen=True)
class Operation:
    """A weighted layer, or the two products of an attention module.

    Attributes:
        path: the module.
        macs: multiply-accumulates per sample.
        weights: bits of the weight; None for attention products, which have none.
        activations: bits of the input, or of q, k and v.
    """

    path: str
    macs: int
    weights: int | None
    activations: int


def operations(checkpoint: Checkpoint) -> list[Operation] | None:
    """The multiplications of a checkpoint's denoiser, in execution order, attention products last.

    None for a checkpoint of a version that did not store them.
    """
    described = read_layers(checkpoint.layers)
    if described.macs is None:
        return None
    with open_tensors(checkpoint.quantized) as stored:
        state = set(stored.keys())
    recipe = Recipe.from_json(checkpoint.recipe or {})
    covered = {layer.path: layer for layer in described.layers}
    found = []
    for path, macs in described.macs.items():
        layer = covered.get(path)
        formats = recipe.formats(path) if layer is None else formats_as_described(layer, recipe)
        weights, activations = map(_bits, formats)
        looked_up = f"{path}.feature.rows" in state
        rounded = f"{path}.weight.0.codes" in state
        quantized_input = layer is not None and not layer.float_input
        found.append(
            Operation(
                path,
                0 if looked_up else macs,
                weights if rounded else FLOAT_BITS,
                activations if quantized_input else FLOAT_BITS,
            )
        )
    activations = _bits(parse_format(recipe.activations))
    attended = set(described.attentions)
    for path, macs in described.products.items():
        found.append(Operation(path, macs, None, activations if path in attended else FLOAT_BITS))
    return found


def effective_bits(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Bits of weights and activations, averaged over multiplications, and what is float.

    Returns:
        ``weights`` (over layers), ``activations`` (over layers and attention products), ``float_mac_share``
        and the paths of what is ``float``; None where `operations` is None.
    """
    found = operations(checkpoint)
    return None if found is None else summary(found)


def summary(found: list[Operation]) -> dict[str, Any]:
    """The averages of some operations; see `effective_bits`."""
    layers = [(op.macs, op.weights) for op in found if op.weights is not None]
    inputs = [(op.macs, op.activations) for op in found]
    islands = [op for op in found if FLOAT_BITS in (op.weights, op.activations)]
    total = sum(op.macs for op in found)
    return {
        "weights": _mean(layers),
        "activations": _mean(inputs),
        "float_mac_share": round(sum(op.macs for op in islands) / total, 4) if total else 0.0,
        "float": [op.path for op in islands if op.macs],
    }


def _mean(counted: list[tuple[int, int]]) -> float:
    total = sum(macs for macs, _ in counted)
    return round(sum(macs * bits for macs, bits in counted) / total, 3) if total else 0.0


def _bits(number_format: Format | None) -> int:
    return FLOAT_BITS if number_format is None else number_format.bits
