"""Weights whose int8 products overflow on a processor without VNNI."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import WEIGHTED_OPS, constant, upstream
from qdeploy.export.graph.quantizer import Quantizer, dequantized, read_quantizer, zeros_of
from qdeploy.export.graph.writer import Writer

# Such a processor adds two products of an unsigned and a signed byte in 16 bits: 255 x 128 fits, 255 x 129 does not.
LARGEST_PAIR = 128


class NarrowSums(InPlacePass):
    """Weights become floats where two of their int8 products could overflow 16 bits.

    1. A Conv, Gemm or MatMul multiplies activations that were quantized by codes that a DequantizeLinear reads
       from a constant.
    2. In some output channel two positive codes, or two negative ones, have a sum beyond `LARGEST_PAIR`. Which
       products a kernel adds in 16 bits is not known, so any two count.
    3. Then the constant holds what the DequantizeLinear would compute, bit for bit, and the product is one of floats.

    It does not fire for weights of seven bits and fewer, nor for layers whose activations are floats.
    """

    def call(self, model: ir.Model) -> PassResult:
        found = list(overflowing(model))
        for weights, _ in found:
            writer = Writer(model, weights.node)
            floats = writer.constant(dequantized(weights), f"{weights.node.name}/floats")
            writer.replace(weights.output, floats)
        return PassResult(model, bool(found))


def overflowing(model: ir.Model) -> Iterator[tuple[Quantizer, ir.Node]]:
    """The DequantizeLinear of weights that could overflow, each with the first layer that reads it."""
    seen: set[ir.Node] = set()
    for layer in model.graph:
        if layer.op_type not in WEIGHTED_OPS:
            continue
        inputs, weights = (_dequantizer(value) for value in layer.inputs[:2])
        if inputs is None or weights is None or weights.node in seen:
            continue
        seen.add(weights.node)
        if constant(inputs.data) is None and _could_overflow(weights):
            yield weights, layer


def _dequantizer(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear that a value comes from, moved or not."""
    node = upstream(value)
    return read_quantizer(node) if node is not None and node.op_type == "DequantizeLinear" else None


def _could_overflow(weights: Quantizer) -> bool:
    codes = constant(weights.data)
    # Blocks and floats have no int8 kernels.
    if codes is None or codes.dtype != np.int8 or codes.size < 2 or weights.block_size:
        return False
    scales, zeros = weights.scales, zeros_of(weights)
    if scales is None or zeros is None:
        return False  # computed by the graph
    if zeros != {0}:
        return True  # not exported by qdeploy: how a runtime treats the zero points is unknown
    # The axis of the output channels is that of the scales; a single scale has none.
    axis = weights.axis % codes.ndim if scales.ndim else None
    rows = (
        codes.reshape(1, -1) if axis is None else np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
    )
    if rows.shape[1] < 2:
        return False
    largest = np.partition(rows, -2, axis=1)[:, -2:].astype(np.int32).clip(min=0).sum(1)
    smallest = np.partition(rows, 1, axis=1)[:, :2].astype(np.int32).clip(max=0).sum(1)
    return bool(max(largest.max(), -smallest.min()) > LARGEST_PAIR)
