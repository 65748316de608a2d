"""Store codes of four bits in four bits."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import block_size, constant

OPSET_FLOAT4 = 23


class PackedCodes(InPlacePass):
    """Codes of a DequantizeLinear in blocks become INT4 or FLOAT4E2M1, two to a byte, the first in the low half.

    Tracing knows no type of four bits.

    1. A DequantizeLinear with a ``block_size`` reads constant int8 or float8 codes, and has no zero point.
    2. All codes are numbers of the type of four bits, and every user of them is such a node.
    3. Then the constant's type becomes INT4 or FLOAT4E2M1. The result's type is the scale's, as before.
    4. A graph with FLOAT4E2M1 is of opset 23, which has it. Nothing that opset 21 says is otherwise in 23. The tracer
       would write attention as one Attention at once, which TensorRT for RTX does not build in float32.
    """

    def call(self, model: ir.Model) -> PassResult:
        import ml_dtypes

        packed = {ir.DataType.INT8: ml_dtypes.int4, ir.DataType.FLOAT8E4M3FN: ml_dtypes.float4_e2m1fn}
        modified = False
        for node in model.graph:
            codes = node.inputs[0] if node.inputs else None
            if codes is None or codes.dtype not in packed or not _in_blocks(node):
                continue
            numbers, narrow = constant(codes), packed[codes.dtype]
            if numbers is None or not (numbers.astype(narrow).astype(numbers.dtype) == numbers).all():
                continue
            if not all(_in_blocks(use.node) for use in codes.uses()):
                continue
            codes.const_value = ir.tensor(numbers.astype(narrow), name=codes.name)
            codes.dtype = codes.const_value.dtype
            modified = True
            if narrow is ml_dtypes.float4_e2m1fn:
                model.opset_imports[""] = max(OPSET_FLOAT4, model.opset_imports[""])
        return PassResult(model, modified)


def _in_blocks(node: ir.Node) -> bool:
    """Whether it is a DequantizeLinear in blocks without zero point."""
    return node.op_type == "DequantizeLinear" and block_size(node) > 0 and len(node.inputs) == 2
