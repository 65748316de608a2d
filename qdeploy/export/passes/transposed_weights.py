"""Store quantized weights of MatMul the way MatMul reads them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer


class TransposedWeights(InPlacePass):
    """``Transpose(DequantizeLinear(codes, axis=0))`` becomes ``DequantizeLinear(codes^T, axis=1)``.

    Engines look for DequantizeLinear directly at the weight input.

    1. The transposition swaps the two axes of a matrix.
    2. Its input is a DequantizeLinear along axis 0, of a constant, with no other user.
    3. Then the codes are transposed, and the DequantizeLinear runs along axis 1.

    It does not fire where the transposed weight is an output of the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
                continue
            if "perm" in node.attributes and tuple(node.attributes["perm"].as_ints()) != (1, 0):
                continue
            dequantize = producer(node.inputs[0])
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            source = dequantize.inputs[0]
            codes = constant(source)
            axis = dequantize.attributes.get("axis")
            if codes is None or codes.ndim != 2 or source is None or axis is None or axis.as_int() != 0:
                continue
            if len(dequantize.outputs[0].uses()) != 1 or len(source.uses()) != 1:
                continue
            tensor = ir.tensor(codes.T.copy(), dtype=source.dtype, name=source.name)
            source.const_value, source.shape = tensor, ir.Shape(codes.T.shape)
            dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
            dequantize.outputs[0].shape = ir.Shape(codes.T.shape)
            ir.convenience.replace_all_uses_with(node.outputs[0], dequantize.outputs[0])
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified)
