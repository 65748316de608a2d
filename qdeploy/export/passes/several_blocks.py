"""Four-bit weights whose scales span the whole input, in blocks that TensorRT for RTX reads in four bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.quantizer import INT4, Quantizer, read_quantizer, zeros_of
from qdeploy.export.graph.writer import Writer

_BLOCKS = (128, 64, 32, 16)


class SeveralBlocks(InPlacePass):
    """``MatMul(x, DQ(codes, scales))`` with one scale for each column becomes the same with the scales by block.

    The builder multiplies int4 weights as they are stored only where a column has several blocks. With one scale for
    a column it writes the whole weight in 16 bits in every call, and reads it again: more bytes than 16-bit weights
    move.

    1. The weight of a MatMul comes from a DequantizeLinear of constant int4 codes ``[in, out]``, without a zero point
       other than 0, with a constant scale for each output channel, or one block along the inputs.
    2. The other input is not quantized.
    3. The inputs divide into two or more blocks of 128, 64, 32 or 16; the largest that do are taken.
    4. Then every block gets its column's scale: the same numbers.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            weight = _weight(node)
            if weight is not None:
                _rewrite(model, node, weight)
                modified = True
        return PassResult(model, modified)


def _weight(node: ir.Node) -> Quantizer | None:
    """The quantizer of a MatMul's weight, if the rule applies to it."""
    if node.op_type != "MatMul":
        return None
    weight = read_quantizer(producer(node.inputs[1]))
    if weight is None or weight.quantizes or weight.codes != INT4 or zeros_of(weight) != {0}:
        return None
    codes, scales = constant(weight.data), weight.scales
    if codes is None or scales is None or codes.ndim != 2 or scales.size != codes.shape[1]:
        return None
    spans = (scales.ndim == 1 and weight.axis == 1) or (scales.ndim == 2 and weight.axis == 0)
    if not spans or _block(codes.shape[0]) is None or read_quantizer(producer(node.inputs[0])) is not None:
        return None
    return weight


def _block(inputs: int) -> int | None:
    return next((block for block in _BLOCKS if inputs % block == 0 and inputs > block), None)


def _rewrite(model: ir.Model, node: ir.Node, weight: Quantizer) -> None:
    inputs = constant(weight.data).shape[0]
    block = _block(inputs)
    assert block is not None  # `_weight` has looked
    scales = np.tile(weight.scales.reshape(1, -1), (inputs // block, 1))
    write = Writer(model, node)
    stored = write.constant(scales, f"{weight.scale.name}/blocks" if weight.scale is not None else "blocks")
    read = write.node(
        "DequantizeLinear",
        weight.data,
        stored,
        shape=weight.output.shape,
        dtype=weight.output.dtype,
        axis=0,
        block_size=block,
    )
    node.replace_input_with(1, read)
