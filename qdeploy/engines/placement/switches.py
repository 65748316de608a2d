"""The quantizers of a graph that can be removed one by one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from qdeploy.export.graph import MOVES, WEIGHTED, label, upstream
from qdeploy.export.graph.quantizer import dequantized, read_quantizer
from qdeploy.export.graph.writer import Writer

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Switch:
    """A quantizer of activations, and the layers that compute in int8 because of it.

    Attributes:
        name: name of its QuantizeLinear.
        nodes: names of the QuantizeLinear and of all DequantizeLinear behind it.
        products: names of the Conv, Gemm and MatMul that read it.
    """

    name: str
    nodes: tuple[str, ...]
    products: tuple[str, ...]


def find_switches(model: ir.Model) -> list[Switch]:
    """All quantizers of activations that products read, in the graph's order.

    A quantizer whose codes an operator other than DequantizeLinear reads cannot be removed, and is left out.
    """
    found = []
    for node in model.graph:
        pairs = _pairs(node)
        products = tuple(dict.fromkeys(name for pair in pairs for name in _products(pair.outputs[0])))
        if products:
            found.append(Switch(label(node), (label(node), *map(label, pairs)), products))
    return found


def take_out(model: ir.Model, names: Collection[str]) -> ir.Model:
    """Remove quantizers, and let the layers behind them multiply floats.

    Their weights become floats too: an engine would otherwise unpack them at every call, or round activations on
    its own.

    Args:
        model: the graph; it is changed.
        names: names of `Switch`.

    Returns:
        The same graph.
    """
    freed: set[str] = set()
    for switch in find_switches(model):
        if switch.name in names:
            freed.update(switch.products)
    for node in list(model.graph):
        if label(node) not in names:
            continue
        (source,) = node.inputs[:1]
        assert source is not None
        for pair in _pairs(node):
            ir.convenience.replace_all_uses_with(pair.outputs[0], source)
            model.graph.remove(pair, safe=True)
        model.graph.remove(node, safe=True)
    for node in list(model.graph):
        if label(node) in freed:
            for value in node.inputs:
                _unpack(model, value)
    return model


def _pairs(node: ir.Node) -> list[ir.Node]:
    """The DequantizeLinear behind a quantizer of activations; none if it cannot be taken out."""
    if node.op_type != QUANTIZE or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return []
    users = [use.node for use in node.outputs[0].uses()]
    apart = all(user.op_type == DEQUANTIZE and not user.outputs[0].is_graph_output() for user in users)
    return users if apart else []


def _products(value: ir.Value) -> list[str]:
    """Names of the products that read a value, also through operations that only move it."""
    found = []
    for use in value.uses():
        if use.node.op_type in WEIGHTED:
            found.append(label(use.node))
        elif use.node.op_type in MOVES:
            found.extend(_products(use.node.outputs[0]))
    return found


def _unpack(model: ir.Model, value: ir.Value | None) -> None:
    """Replace the integers that a product reads as weights by the floats that they stand for."""
    found = read_quantizer(upstream(value))
    if found is not None and not found.quantizes and (floats := dequantized(found)) is not None:
        write = Writer(model, found.node)
        write.replace(found.output, write.constant(floats, f"{label(found.node)}/float"))
