"""Activations as unsigned integers, which x86 multiplies with signed weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant
from qdeploy.export.graph.writer import Writer


class UnsignedCodes(InPlacePass):
    """int8 codes of activations become uint8 codes: 128 is added to code and zero point.

    VNNI multiplies unsigned by signed bytes. ONNX Runtime 1.31 has no fast kernel for signed activations: a
    product of int8 by int8 takes 20 to 40 times as long.

    1. A QuantizeLinear has a constant scalar zero point in int8, and only DequantizeLinear read its codes, with
       equal zero points.
    2. Then both get the zero point plus 128, in uint8. Codes saturate at the same values as before, and what
       is dequantized is the same, bit for bit.

    It does not fire where the codes are an output of the graph or another operator reads them.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
                continue
            zero = constant(node.inputs[2])
            readers = [use.node for use in node.outputs[0].uses()]
            if zero is None or zero.dtype != np.int8 or zero.ndim or node.outputs[0].is_graph_output():
                continue
            if not readers or not all(_dequantizes(reader, zero) for reader in readers):
                continue
            shifted = Writer(model, node).constant(np.uint8(int(zero) + 128), "zero_point")
            for user in (node, *readers):
                user.replace_input_with(2, shifted)
            node.outputs[0].dtype = ir.DataType.UINT8
            modified = True
        return PassResult(model, modified)


def _dequantizes(node: ir.Node, zero: np.ndarray) -> bool:
    """Whether a node dequantizes with that zero point."""
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return False
    own = constant(node.inputs[2])
    return own is not None and own.dtype == zero.dtype and np.array_equal(own, zero)
