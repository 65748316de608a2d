"""The factor of attention's scores, in the weight scales of a projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer
from qdeploy.export.passes.scaled_scores import scaled_input, take_factors

_MOVES = ("Reshape", "Transpose")


class FoldedScores(InPlacePass):
    """``MatMul(q * s, k * t)`` with ``q = x DQ(codes, scales) + bias`` becomes ``MatMul(q', k)``, both factors in q'.

    Torch's exporter scales queries and keys by the fourth root of their length each. TensorRT for RTX takes the
    factors into its attention kernel where q and k are 16-bit results, but behind quantized projections, whose weight
    scales it multiplies afterwards, it runs them and the transposition of the keys as kernels of their own.

    1. An input of a MatMul is a Mul by one number, and the first input comes, by Reshapes and Transposes that
       nothing else reads, from a MatMul with a DequantizeLinear of constant scales, with or without a constant bias.
    2. Then the weight scales and the bias are multiplied by the factors' product, and the Muls are left out.

    The products stay within half precision where they were: they are the same numbers, and q becomes smaller.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MatMul":
                continue
            scaled = scaled_input(node.inputs[0])
            projection = _projection(node.inputs[0] if scaled is None else scaled[0])
            if projection is not None and (factor := take_factors(node)) is not None:
                _fold(model, projection, factor)
                modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Projection:
    """A quantized linear layer: the DequantizeLinear of its weight, and the Add of its bias, if any."""

    weight: ir.Node
    add: ir.Node | None


def _projection(value: ir.Value | None) -> _Projection | None:
    node = _alone(value)
    while node is not None and node.op_type in _MOVES:
        node = _alone(node.inputs[0])
    add = None
    if node is not None and node.op_type == "Add":
        add, biases = node, [constant(each) for each in node.inputs]
        if (biases[0] is None) == (biases[1] is None):
            return None
        node = _alone(node.inputs[0 if biases[0] is None else 1])
    if node is None or node.op_type != "MatMul":
        return None
    weight = producer(node.inputs[1])
    if weight is None or weight.op_type != "DequantizeLinear" or len(weight.outputs[0].uses()) != 1:
        return None
    return None if constant(weight.inputs[1]) is None else _Projection(weight, add)


def _alone(value: ir.Value | None) -> ir.Node | None:
    """What computes a value, if it has one reader alone."""
    if value is None or value.is_graph_output():
        return None
    return producer(value) if len(value.uses()) == 1 else None


def _fold(model: ir.Model, projection: _Projection, factor: np.float32) -> None:
    weight, add = projection.weight, projection.add
    scales = constant(weight.inputs[1])
    write = Writer(model, weight)
    weight.replace_input_with(1, write.constant((scales * factor).astype(scales.dtype), "weight_scale"))
    if add is not None:
        position = next(place for place, value in enumerate(add.inputs) if constant(value) is not None)
        bias = constant(add.inputs[position])
        add.replace_input_with(position, write.constant((bias * factor).astype(bias.dtype), "bias"))
