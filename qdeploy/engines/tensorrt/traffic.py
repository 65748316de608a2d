"""Bytes that the layers of a plan read and write in a call, by the type that they are stored in.

Every layer reads its inputs and constants from the GPU's memory and writes its outputs there; what stays inside a
fused layer costs nothing. Caches are not modelled: the sum is what a call moves at most, and most of what bounds the
speed of layers that are not matrix products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from qdeploy.engines.tensorrt.inspector import dtype

BITS = {
    "int8": 8,
    "fp8": 8,
    "int4": 4,
    "fp4": 4,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "int32": 32,
    "int64": 64,
    "bool": 8,
}


def bytes_moved(layers: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Count the bytes of a call.

    Args:
        layers: see `qdeploy.engines.tensorrt.inspector.parse_layers`.
        batch: what an axis of open size counts as. In a plan for several shapes, an open axis can be the product of
            batch and tokens; the count is then too low, and ``exact`` says so.

    Returns:
        ``activations`` and ``weights``, each bytes by type; ``total``; and ``exact``.
    """
    activations: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    exact = True
    for layer in layers:
        for side, counted in (("Inputs", activations), ("Outputs", activations), ("Constants", weights)):
            for tensor in layer.get(side, []):
                sizes = tensor.get("Dimensions", [])
                exact = exact and -1 not in sizes
                kind = dtype(tensor)
                elements = prod(batch if size == -1 else size for size in sizes)
                counted[kind] += elements * BITS.get(kind, 0) // 8
    total = activations.total() + weights.total()
    return {
        "activations": dict(sorted(activations.items())),
        "weights": dict(sorted(weights.items())),
        "total": total,
        "exact": exact,
    }
