"""Weights whose int8 products a processor without VNNI cannot add."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import WEIGHTED_OPS, block_size, constant, producer
from qdeploy.export.macs import MOVES
from qdeploy.export.writer import Writer

# Such a processor adds two products of an unsigned and a signed byte in 16 bits: 255 x 128 fits, 255 x 129 does not.
LARGEST_PAIR = 128


class NarrowSums(InPlacePass):
    """Weights become floats where two of their int8 products could overflow 16 bits.

    1. A Conv, Gemm or MatMul multiplies activations that were quantized by codes that a DequantizeLinear reads
       from a constant.
    2. In some output channel two positive codes, or two negative ones, have a sum beyond `LARGEST_PAIR`. Which
       products a kernel adds in 16 bits is its own affair, so any two count.
    3. Then the constant holds what the DequantizeLinear would compute, bit for bit, and the product is one of floats.

    It does not fire for weights of seven bits and fewer, nor for layers whose activations are floats.
    """

    def call(self, model: ir.Model) -> PassResult:
        found = list(overflowing(model))
        for node, _ in found:
            codes, scale, *zero = (constant(value) for value in node.inputs)
            axis = _axis(node)
            shape = [] if axis is None else [-1 if dim == axis else 1 for dim in range(codes.ndim)]
            zeros = zero[0].astype(np.int32).reshape(shape) if zero else 0
            values = (codes.astype(np.int32) - zeros).astype(np.float32) * scale.reshape(shape)
            writer = Writer(model, node)
            writer.replace(node.outputs[0], writer.constant(values, f"{node.name}/floats"))
        return PassResult(model, bool(found))


def overflowing(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The DequantizeLinear of weights that could overflow, each with the first layer that reads it."""
    seen: set[ir.Node] = set()
    for layer in model.graph:
        if layer.op_type not in WEIGHTED_OPS:
            continue
        inputs, weights = (_dequantized(value) for value in layer.inputs[:2])
        if inputs is None or weights is None or weights in seen:
            continue
        seen.add(weights)
        if constant(inputs.inputs[0]) is None and _could_overflow(weights):
            yield weights, layer


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, moved or not."""
    node = producer(value)
    while node is not None and node.op_type in MOVES:
        node = producer(node.inputs[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _could_overflow(node: ir.Node) -> bool:
    codes = constant(node.inputs[0])
    # Blocks and floats have no int8 kernels.
    if codes is None or codes.dtype != np.int8 or codes.size < 2 or block_size(node):
        return False
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None and zero.any():
        return True  # none of ours; what a runtime makes of zero points is its own affair
    axis = _axis(node)
    rows = (
        codes.reshape(1, -1) if axis is None else np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
    )
    if rows.shape[1] < 2:
        return False
    largest = np.partition(rows, -2, axis=1)[:, -2:].astype(np.int32).clip(min=0).sum(1)
    smallest = np.partition(rows, 1, axis=1)[:, :2].astype(np.int32).clip(max=0).sum(1)
    return bool(max(largest.max(), -smallest.min()) > LARGEST_PAIR)


def _axis(node: ir.Node) -> int | None:
    """The axis of the output channels, which is that of the scales; None where all share a scale."""
    if constant(node.inputs[1]).ndim == 0:
        return None
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else int(attribute.as_int())
    return axis % len(constant(node.inputs[0]).shape)
