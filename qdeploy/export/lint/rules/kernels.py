"""Sizes: what has a fast low-bit kernel, and what is too thin for one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qdeploy.export.graph.network import Network, WeightedNode
from qdeploy.export.graph.nodes import MOVES, stored
from qdeploy.export.graph.quantizer import FP8, INT8
from qdeploy.export.lint.rule import Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope
from qdeploy.recipe.kernel_limits import thin_conv, thin_float_conv, thin_product

INT8_HEADS, INT8_TOKENS = (16, 32, 64), 512  # what the fused int8 attention takes


@dataclass(frozen=True)
class Attention:
    """Two products of activations with a Softmax between, and the nodes between the first and the Softmax."""

    scores: WeightedNode
    softmax: ir.Node
    mix: WeightedNode
    between: tuple[ir.Node, ...]


@rule("TRT024", W, "quantized convolutions are wide", "thin ones have no fast kernel", "MO")
def narrow_convolution(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        weight = net.shape(layer.node.inputs[1])
        if layer.node.op_type != "Conv" or layer.low_bit is None or weight is None:
            continue
        group = layer.node.attributes.get_int("group", 1)
        if layer.low_bit == FP8 and thin_float_conv(weight, group):
            yield Hit(layer.node, f"an fp8 convolution of weight {weight}: leave it in floats")
        elif layer.low_bit == INT8 and thin_conv(weight, group, _on_graph_input(net, layer)):
            yield Hit(layer.node, f"an int8 convolution of weight {weight}: leave it in floats")


def _on_graph_input(net: Network, layer: WeightedNode) -> bool:
    source = layer.sources[0]
    first = source.data.producer() if source else None
    return bool(first and first.inputs[0] is not None and first.inputs[0].is_graph_input())


@rule(
    "TRT025",
    W,
    "quantized products are of matrices",
    "a product with one row or column, or thinner than 16, is bound by memory: Q and DQ only cost",
    "MO",
)
def narrow_product(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        if layer.node.op_type not in ("MatMul", "Gemm") or layer.low_bit is None:
            continue
        if size := product_size(net, layer):
            rows, columns, inner = size
            if thin_product(columns, inner, rows):
                what = f"a product of {rows} x {inner} by {inner} x {columns}"
                yield Hit(layer.node, f"{what} at the optimal shape: leave it in floats")


def product_size(net: Network, layer: WeightedNode) -> tuple[int, int, int] | None:
    """Rows and columns of a product's result, and the length of its sums; rows over a whole batch."""
    x, y = net.shape(layer.node.inputs[0]), net.shape(layer.node.outputs[0])
    if not x or not y:
        return None
    inner = x[0] if layer.node.attributes.get_int("transA", 0) else x[-1]
    rows = prod(y[:-1]) if layer.weight is not None else (y[-2] if len(y) > 1 else 1)
    return rows, y[-1], inner


def attentions(net: Network) -> Iterator[Attention]:
    """Every softmax(q k) v of the graph."""
    products = {id(layer.node): layer for layer in net.layers if layer.weight is None}
    steps = (*MOVES, "Cast", "Add", "Mul", "Div", "QuantizeLinear", "DequantizeLinear")
    for softmax in net.nodes:
        if softmax.op_type != "Softmax":
            continue
        between: list[ir.Node] = []
        value = softmax.inputs[0]
        while value is not None and (node := value.producer()) is not None and node.op_type in steps:
            between.append(node)
            value = next((x for x in node.inputs if x is not None and not stored(x)), None)
        scores = products.get(id(value.producer())) if value is not None else None
        for user, position in net.users(softmax.outputs[0], steps):
            mix = products.get(id(user))
            if scores and mix and position == 0:
                yield Attention(scores, softmax, mix, tuple(between))


@rule(
    "TRT026",
    W,
    "int8 attention has at most 512 tokens and heads of 16, 32 or 64",
    "outside, Q and DQ split the fused attention into three kernels, slower than FP16",
    "ISS, MO",
)
def int8_attention(net: Network, scope: Scope) -> Hits:
    for attention in attentions(net):
        if not any(s and s.codes == INT8 for part in (attention.scores, attention.mix) for s in part.sources):
            continue
        size = product_size(net, attention.scores)
        if scope.engine == "tensorrt-rtx":
            yield Hit(
                attention.scores.node,
                "int8 attention never fuses: leave its products in floats, or all in fp8",
            )
        elif size and (max(size[:2]) > INT8_TOKENS or size[2] not in INT8_HEADS):
            what = f"int8 attention of {size[0]} by {size[1]} tokens, heads of {size[2]}"
            yield Hit(attention.scores.node, f"{what}: leave its products in floats")


@rule(
    "TRT027",
    W,
    "fp8 attention has q, k, v and the softmax quantized, and heads of 16 to 256, in steps of 16",
    "a partial pattern does not fuse",
    "MO",
)
def fp8_attention(net: Network, scope: Scope) -> Hits:
    for attention in attentions(net):
        sources = (*attention.scores.sources, *attention.mix.sources)
        fp8 = sum(source is not None and source.codes == FP8 for source in sources)
        size = product_size(net, attention.scores)
        if 0 < fp8 < 4:
            yield Hit(attention.scores.node, f"{fp8} of q, k, v and softmax are fp8: quantize all or none")
        elif scope.engine != "tensorrt-rtx" and fp8 and size and (size[2] % 16 or not 8 < size[2] <= 256):
            yield Hit(attention.scores.node, f"fp8 heads of {size[2]}: leave this attention in 16 bits")


@rule(
    "TRT040",
    W,
    "attention is scaled before its first product",
    "on the scores the scale overflows sooner in FP16, and keeps patterns from fusing",
    "DOC",
)
def scaled_scores(net: Network, scope: Scope) -> Hits:
    for attention in attentions(net):
        for node in attention.between:
            if node.op_type in ("Mul", "Div") and any(stored(x) for x in node.inputs):
                yield Hit(node, "scales the scores: multiply q (or k) before the product instead")
