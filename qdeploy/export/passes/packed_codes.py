"""Store codes of four bits in four bits."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import block_size, constant


class PackedCodes(InPlacePass):
    """int8 codes of a DequantizeLinear in blocks become INT4, two to a byte, the first in the low half.

    Tracing knows no type of four bits.

    1. A DequantizeLinear with a ``block_size`` reads constant int8 codes, and has no zero point.
    2. All codes are from -8 to 7, and every user of them is such a node.
    3. Then the constant's type becomes INT4. The result's type is the scale's, as before.
    """

    def call(self, model: ir.Model) -> PassResult:
        import ml_dtypes

        modified = False
        for node in model.graph:
            codes = node.inputs[0] if node.inputs else None
            if codes is None or codes.dtype != ir.DataType.INT8 or not _in_blocks(node):
                continue
            numbers = constant(codes)
            if numbers is None or numbers.min() < -8 or numbers.max() > 7:
                continue
            if not all(_in_blocks(use.node) for use in codes.uses()):
                continue
            codes.const_value = ir.tensor(numbers.astype(ml_dtypes.int4), name=codes.name)
            codes.dtype = ir.DataType.INT4
            modified = True
        return PassResult(model, modified)


def _in_blocks(node: ir.Node) -> bool:
    """Whether it is a DequantizeLinear in blocks without zero point."""
    return node.op_type == "DequantizeLinear" and block_size(node) > 0 and len(node.inputs) == 2
