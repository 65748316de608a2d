"""The integers behind the inputs of a product that was quantized to run on int8 kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdeploy.export.graph.nodes import constant, producer
from qdeploy.export.graph.quantizer import INT8, Quantizer, read_quantizer, zeros_of


@dataclass(frozen=True)
class Operands:
    """What a quantized Conv, MatMul or Gemm multiplies.

    Attributes:
        codes: uint8 codes of the activations.
        scale: [] of the codes.
        zero_point: [] of the codes, a constant.
        weight: int8 codes of the weight as the node has them.
        weight_scale: [out].
        names: of the weight's codes and of its scales.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    weight: np.ndarray
    weight_scale: np.ndarray
    names: tuple[str, str]

    @property
    def quantizer(self) -> ir.Node | None:
        """The QuantizeLinear that made the codes."""
        node = producer(self.codes)
        return node if node is not None and node.op_type == "QuantizeLinear" else None


def operands(node: ir.Node, output_axis: int) -> Operands | None:
    """The operands of a node, if both of its inputs are dequantized.

    Args:
        node: a Conv, MatMul or Gemm.
        output_axis: the weight's axis that its scales have to run along.

    Returns:
        None where activations are not uint8 with one constant scale, or the weight is not constant int8 codes
        with scales along that axis and without a zero point other than 0.
    """
    x, w = (_dequantizer(value) for value in node.inputs[:2])
    if x is None or w is None or x.data.dtype != ir.DataType.UINT8:
        return None
    if x.scale is None or x.zero_point is None or constant(x.zero_point) is None:
        return None
    if constant(x.scale) is None or constant(x.scale).size != 1:
        return None
    stored, scales = constant(w.data), constant(w.scale)
    if stored is None or w.codes != INT8 or scales is None or zeros_of(w) != {0}:
        return None
    if scales.size > 1 and w.axis % stored.ndim != output_axis:
        return None
    scales = np.broadcast_to(scales.reshape(-1), (stored.shape[output_axis],))
    names = (w.data.name or "weight", (w.scale.name if w.scale else None) or "weight.scale")
    return Operands(x.data, x.scale, x.zero_point, stored, scales, names)


def _dequantizer(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear without blocks that computes a value, if one does."""
    node = producer(value)
    found = read_quantizer(node)
    standard = node is not None and node.op_type == "DequantizeLinear"
    return found if found is not None and standard and not found.block_size else None
