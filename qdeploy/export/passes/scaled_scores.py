"""Scale the scores of attention, not the queries and the keys."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer


class ScaledScores(InPlacePass):
    """``MatMul(a * s, b * t)`` with single numbers s and t becomes ``MatMul(a, b) * (s * t)``.

    Torch's exporter scales queries and keys by the fourth root of their length each. Between the transposition
    of the keys and their product, the factor hides from engines that the product can read them as they are.

    1. An input of a MatMul is a Mul by a constant with one element, and a tensor of at least the constant's rank.
    2. Then the product is scaled by the factor instead, or by the product of both inputs' factors.

    It does not fire where the MatMul's output is an output of the graph. A Mul with other users stays for them.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MatMul" or node.outputs[0].is_graph_output():
                continue
            if (factor := take_factors(node)) is not None:
                _scale_output(model, node, factor)
                modified = True
        return PassResult(model, modified)


def take_factors(node: ir.Node) -> np.float32 | None:
    """Let a node read its inputs without the numbers that they are multiplied by.

    Returns:
        The product of those numbers; None if there is none.
    """
    scaled = {
        place: found for place, value in enumerate(node.inputs) if (found := scaled_input(value)) is not None
    }
    factor = np.float32(1)
    for position, (value, by) in scaled.items():
        node.replace_input_with(position, value)
        factor *= by
    return factor if scaled else None


def scaled_input(value: ir.Value | None) -> tuple[ir.Value, np.float32] | None:
    """The tensor and the single number whose product a value is; None if it is no such product."""
    node = producer(value)
    if node is None or node.op_type != "Mul":
        return None
    for x, by in (node.inputs, node.inputs[::-1]):
        factor = constant(by)
        if x is None or factor is None or factor.size != 1 or factor.dtype != np.float32:
            continue
        if x.shape is not None and x.shape.rank() >= factor.ndim and constant(x) is None:
            return x, factor.reshape(())[()]
    return None


def _scale_output(model: ir.Model, node: ir.Node, factor: np.float32) -> None:
    product = node.outputs[0]
    users = list(product.uses())
    write = Writer(model, node, behind=True)
    scaled = write.node("Mul", product, write.constant(np.array(factor)), shape=product.shape)
    for user, position in users:
        user.replace_input_with(position, scaled)
