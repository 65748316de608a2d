"""The matrix products of a graph, and the type that each was quantized to multiply in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qdeploy.export.graph.network import Network, WeightedNode
from qdeploy.export.lint.forecast import KINDS


@dataclass(frozen=True)
class Product:
    """A Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        name: the node's.
        operator: the node's.
        kind: ``int8`` or ``fp8`` where both inputs are quantized to it, ``int4`` or ``fp4`` where the weight is;
            empty for a product of floats.
        weights_only: whether the weight is quantized and the other input is not.
        per_channel: whether the weight has a scale for each output channel.
        single: whether its result is float32.
    """

    name: str
    operator: str
    kind: str
    weights_only: bool
    per_channel: bool
    single: bool


def products(path: Path) -> list[Product]:
    """All products of a graph, in its order.

    Raises:
        InvalidInputError: the file is no ONNX graph.
    """
    net = Network(path)
    return [_product(net, layer) for layer in net.layers]


def _product(net: Network, layer: WeightedNode) -> Product:
    x, weight = layer.sources
    kind = KINDS.get(layer.low_bit, "") if layer.low_bit is not None else ""
    weights_only = not kind and weight is not None and weight.codes in KINDS and x is None
    if not kind and weight is not None and weight.codes in (ir.DataType.INT4, ir.DataType.FLOAT4E2M1):
        kind = KINDS[weight.codes]
    return Product(
        layer.node.name or "",
        layer.node.op_type,
        kind,
        weights_only,
        weight is not None and weight.per_channel,
        net.dtype(layer.node.outputs[0]) == ir.DataType.FLOAT,
    )
