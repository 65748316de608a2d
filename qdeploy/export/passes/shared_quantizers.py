"""Quantize a tensor once for all layers that read it with the same scale."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant


class SharedQuantizers(InPlacePass):
    """Equal Q/DQ pairs on one tensor become one pair.

    1. Two QuantizeLinear, or two DequantizeLinear, read the same tensor.
    2. Their scales and zero points are equal constants of equal types, or the same tensors, and their attributes are
       equal.
    3. Then the later one's users read the earlier one's output.

    It does not fire where the later one's output is an output of the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        seen: dict[tuple[object, ...], ir.Node] = {}
        for node in list(model.graph):
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            if node.outputs[0].is_graph_output():
                continue
            key = (
                node.op_type,
                id(node.inputs[0]),
                *(_identity(value) for value in node.inputs[1:] if value is not None),
                *sorted(str(attribute) for attribute in node.attributes.values()),
            )
            first = seen.setdefault(key, node)
            if first is not node:
                ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
                model.graph.remove(node, safe=True)
                modified = True
        return PassResult(model, modified)


def _identity(value: ir.Value) -> object:
    """Type and content of a constant; else a number that is the tensor's own."""
    array = constant(value)
    return id(value) if array is None else (array.dtype.str, array.shape, array.tobytes())
