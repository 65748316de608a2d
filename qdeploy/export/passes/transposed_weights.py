"""Store quantized weights of MatMul the way MatMul reads them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import block_size, constant, producer


class TransposedWeights(InPlacePass):
    """``Transpose(DequantizeLinear(codes, axis=0))`` becomes ``DequantizeLinear(codes^T, axis=1)``.

    Engines look for DequantizeLinear directly at the weight input.

    1. The transposition swaps the two axes of a matrix.
    2. Its input is a DequantizeLinear along axis 0, or in blocks along either axis, of a constant, with no
       other user; scales in blocks are a constant with no other user too.
    3. Then the codes are transposed, scales in blocks with them, and the DequantizeLinear runs along the
       other axis.

    It does not fire where the transposed weight is an output of the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
                continue
            if tuple(node.attributes.get_ints("perm", (1, 0))) != (1, 0):
                continue
            dequantize = producer(node.inputs[0])
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            axis = _axis(dequantize)
            if axis is None or len(dequantize.outputs[0].uses()) != 1:
                continue
            matrices = [value for value in dequantize.inputs if value is not None and _rank(value) == 2]
            if any(len(value.uses()) != 1 for value in matrices):
                continue
            for value in matrices:
                _transpose(value)
            dequantize.attributes["axis"] = ir.AttrInt64("axis", 1 - axis)
            dequantize.outputs[0].shape = matrices[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], dequantize.outputs[0])
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified)


def _axis(dequantize: ir.Node) -> int | None:
    """The axis of a matrix that its scales run along; None where the rules do not hold."""
    codes, scale, *zero = dequantize.inputs
    axis = dequantize.attributes.get("axis")
    if axis is None or codes is None or _rank(codes) != 2:
        return None
    if not block_size(dequantize):
        return 0 if axis.as_int() == 0 else None
    stored = all(value is None or _rank(value) == 2 for value in (scale, *zero))
    return axis.as_int() % 2 if stored else None


def _rank(value: ir.Value) -> int | None:
    """Number of axes of a constant; None if it is computed."""
    numbers = constant(value)
    return None if numbers is None else int(numbers.ndim)


def _transpose(value: ir.Value) -> None:
    numbers = constant(value).T.copy()
    value.const_value = ir.tensor(numbers, dtype=value.dtype, name=value.name)
    value.shape = ir.Shape(numbers.shape)
