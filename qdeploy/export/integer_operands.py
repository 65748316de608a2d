"""The integers behind the inputs of a product that was quantized to run on int8 kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdeploy.export.graph import block_size, constant, producer


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
    left, right = producer(node.inputs[0]), producer(node.inputs[1])
    if not all(
        n is not None and n.op_type == "DequantizeLinear" and not block_size(n) for n in (left, right)
    ):
        return None
    assert left is not None
    assert right is not None
    codes, scale, zero = (*left.inputs, None)[:3]
    if codes is None or codes.dtype != ir.DataType.UINT8 or zero is None or constant(zero) is None:
        return None
    if scale is None or constant(scale) is None or constant(scale).size != 1:
        return None
    stored, weight_scale = constant(right.inputs[0]), constant(right.inputs[1])
    if stored is None or stored.dtype != np.int8 or weight_scale is None:
        return None
    zeros = constant(right.inputs[2]) if len(right.inputs) > 2 else None
    if len(right.inputs) > 2 and right.inputs[2] is not None and (zeros is None or zeros.any()):
        return None
    axis = right.attributes["axis"].as_int() if "axis" in right.attributes else 1
    if weight_scale.size > 1 and axis % stored.ndim != output_axis:
        return None
    scales = np.broadcast_to(weight_scale.reshape(-1), (stored.shape[output_axis],))
    names = (_name(right.inputs[0], "weight"), _name(right.inputs[1], "weight.scale"))
    return Operands(codes, scale, zero, stored, scales, names)


def _name(value: ir.Value | None, default: str) -> str:
    return (value.name if value is not None else None) or default
