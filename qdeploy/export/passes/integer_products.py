"""Quantized linear layers as one integer product with a float result."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import INTEGER_PRODUCT, constant
from qdeploy.export.graph.operands import Operands, operands
from qdeploy.export.graph.writer import MICROSOFT, Writer


class IntegerProducts(InPlacePass):
    """A MatMul or Gemm of dequantized uint8 codes and int8 weights becomes MatMulIntegerToFloat.

    It multiplies the codes in integers, and multiplies the 32-bit sums by both scales: the product that Q/DQ
    describe, without rounding anything but the last float operation.

    1. The operands are those of `qdeploy.export.graph.operands.operands`, the weight a matrix.
    2. A Gemm has alpha = beta = 1 and does not transpose its left input.
    3. The bias joins it: the Gemm's, or that of an Add that alone reads the MatMul, if it is a constant with one
       entry per output feature.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.graph is None or node.domain or node.op_type not in ("MatMul", "Gemm"):
                continue
            modified |= _rewrite(model, node)
        return PassResult(model, modified)


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    left, transposed = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    found = operands(node, 0 if transposed else 1)
    if found is None or found.weight.ndim != 2 or left:
        return False
    if any(node.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")):
        return False
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and not _fits(bias, found):
        return False
    last = node
    if node.op_type == "MatMul":
        last, bias = _with_bias(node, found)
    output, weight = last.outputs[0], found.weight.T if transposed else found.weight
    write = Writer(model, last)
    product = integer_product(write, found, found.codes, weight, bias, output.shape)
    write.replace(output, product)
    if last is not node:
        model.graph.remove(node, safe=True)
    return True


def integer_product(
    write: Writer,
    found: Operands,
    codes: ir.Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    shape: ir.Shape | list[object] | None,
) -> ir.Value:
    """The MatMulIntegerToFloat of codes [..., in] and a weight [in, out], named as the weight's codes.

    Args:
        write: where to.
        found: scales, zero point and name.
        codes: uint8, [..., in].
        weight: int8, [in, out].
        bias: [out], or None.
        shape: of the result, if known.
    """
    return write.node(
        INTEGER_PRODUCT,
        codes,
        write.constant(weight, found.names[0]),
        found.scale,
        write.constant(found.weight_scale.astype(np.float32), found.names[1]),
        found.zero_point,
        None,
        *([write.constant(bias.astype(np.float32).reshape(-1), "bias")] if bias is not None else []),
        shape=None if shape is None else list(shape),
        domain=MICROSOFT,
    )


def _with_bias(node: ir.Node, found: Operands) -> tuple[ir.Node, np.ndarray | None]:
    """The Add of a bias behind a MatMul and that bias; or the MatMul itself."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        bias = constant(uses[0].node.inputs[1 - uses[0].idx])
        if _fits(bias, found):
            return uses[0].node, bias
    return node, None


def _fits(bias: np.ndarray | None, found: Operands) -> bool:
    return bias is not None and bias.ndim == 1 and bias.shape == found.weight_scale.shape
