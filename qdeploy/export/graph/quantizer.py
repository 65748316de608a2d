"""The parameters of a QuantizeLinear or DequantizeLinear, with the standard's defaults filled in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qdeploy.export.graph.nodes import FLOAT4, block_size, constant

DataType = ir.DataType
# Operators that map floats to codes, and back; the type of the codes where the operator's name says it.
QUANTIZE = {
    "QuantizeLinear": None,
    "TRT_FP8QuantizeLinear": DataType.FLOAT8E4M3FN,
    "TRT_INT4QuantizeLinear": DataType.INT4,
    FLOAT4: DataType.FLOAT4E2M1,
}
DEQUANTIZE = {
    "DequantizeLinear": None,
    "TRT_FP8DequantizeLinear": DataType.FLOAT8E4M3FN,
    "TRT_INT4DequantizeLinear": DataType.INT4,
    "TRT_MXFP8DequantizeLinear": DataType.FLOAT8E4M3FN,
}
INT8, INT4, FP8, FP4 = DataType.INT8, DataType.INT4, DataType.FLOAT8E4M3FN, DataType.FLOAT4E2M1
FOUR_BIT = (DataType.INT4, DataType.UINT4, DataType.FLOAT4E2M1)
SIXTEEN_BIT = (DataType.FLOAT16, DataType.BFLOAT16)


def readable(value: ir.Value | None) -> Any:
    """A constant's numbers; None if it is computed, or if its data is cut short."""
    try:
        return constant(value)
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Quantizer:
    """A Q or DQ node.

    Attributes:
        node: the node.
        codes: type of the quantized side. A Q that names none counts as int8, as TensorRT reads it; the
            standard says uint8 (TRT003).
        rank: of the data, if known.
    """

    node: ir.Node
    codes: DataType | None
    rank: int | None

    @property
    def quantizes(self) -> bool:
        """Whether it is a Q; else it is a DQ."""
        return self.node.op_type in QUANTIZE

    @property
    def data(self) -> ir.Value:
        """What it reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """What it writes."""
        return self.node.outputs[0]

    @property
    def scale(self) -> ir.Value | None:
        """The scale."""
        return self.node.inputs[1] if len(self.node.inputs) > 1 else None

    @property
    def zero_point(self) -> ir.Value | None:
        """The zero point, if it has one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def scales(self) -> Any:
        """The scale's numbers, if they are constant and readable."""
        return readable(self.scale)

    @property
    def block_size(self) -> int:
        """Elements that share a scale along the axis; 0 unless it is blocked."""
        return block_size(self.node)

    @property
    def blocked(self) -> bool:
        """Whether it has scales by block."""
        rank = scale_rank(self)
        return self.block_size > 0 or (rank is not None and rank > 1)

    @property
    def per_channel(self) -> bool:
        """Whether it has several scales along one axis."""
        scales = self.scales
        return not self.blocked and scales is not None and scales.size > 1

    @property
    def axis(self) -> int:
        """The axis of its scales, counted from the front where the rank is known. The default is 1."""
        axis = int(self.node.attributes.get_int("axis", 1))
        return axis % self.rank if self.rank and -self.rank <= axis < self.rank else axis

    def same_grid(self, other: Quantizer) -> bool:
        """Whether both round to the same numbers: equal constant scales, zero points and types."""
        mine, theirs = self.scales, other.scales
        if mine is None or theirs is None or self.codes != other.codes:
            return False
        if mine.shape != theirs.shape or (mine != theirs).any():
            return False
        return zeros_of(self) == zeros_of(other) and (not self.per_channel or self.axis == other.axis)


def read_quantizer(node: ir.Node | None, rank: int | None = None) -> Quantizer | None:
    """The quantizer that a node is, if it is one; by default the rank is that of the shape in the graph."""
    if node is None or node.op_type not in (*QUANTIZE, *DEQUANTIZE) or not node.inputs:
        return None
    data = node.inputs[0]
    if data is None:
        return None
    if rank is None and data.shape is not None:
        rank = data.shape.rank()
    return Quantizer(node, _codes(node), rank)


def quantizers(model: ir.Model) -> Iterator[Quantizer]:
    """All Q and DQ of a graph; nodes may be removed meanwhile."""
    for node in list(model.graph):
        if found := read_quantizer(node):
            yield found


def dequantized(quantizer: Quantizer) -> Any:
    """The float32 values that a DQ computes from constants, bit for bit; None if one of them is not constant.

    The difference of code and zero point is exact, and the product with the scale is rounded once.
    """
    codes, scales = readable(quantizer.data), quantizer.scales
    zeros = np.zeros(1) if quantizer.zero_point is None else readable(quantizer.zero_point)
    if codes is None or scales is None or zeros is None:
        return None
    difference = codes.astype(np.float64) - spread(quantizer, zeros.astype(np.float64), codes.shape)
    return difference.astype(np.float32) * spread(quantizer, scales.astype(np.float32), codes.shape)


def spread(quantizer: Quantizer, numbers: Any, shape: tuple[int, ...]) -> Any:
    """Scales or zero points of a quantizer, in a shape that broadcasts over data of ``shape``."""
    if numbers.size == 1:
        return numbers.reshape(())
    axis = quantizer.axis % len(shape)
    if quantizer.block_size:
        return numbers.repeat(quantizer.block_size, axis).take(range(shape[axis]), axis)
    return numbers.reshape([-1 if each == axis else 1 for each in range(len(shape))])


def scale_rank(quantizer: Quantizer) -> int | None:
    """Number of axes of the scale."""
    scale = quantizer.scale
    shape = None if scale is None else scale.shape
    if shape is not None:
        return int(shape.rank())
    scales = quantizer.scales
    return None if scales is None else int(scales.ndim)


def zeros_of(quantizer: Quantizer) -> set[int] | None:
    """The values of the zero point; ``{0}`` if it has none, None if they are not constant."""
    if quantizer.zero_point is None:
        return {0}
    values = readable(quantizer.zero_point)
    return None if values is None else {int(value) for value in values.astype("float32").flatten()}


def _codes(node: ir.Node) -> DataType | None:
    named = QUANTIZE.get(node.op_type) or DEQUANTIZE.get(node.op_type)
    if named is not None:
        return named
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if node.op_type in QUANTIZE:
        return DataType(node.attributes.get_int("output_dtype", 0) or INT8)
    data = node.inputs[0]
    before = data.producer() if data is not None else None
    if before is not None and before.op_type == FLOAT4 and data is not before.outputs[0]:
        return DataType.FLOAT8E4M3FN
    if before is not None and before.op_type in QUANTIZE:
        return _codes(before)
    return None if data is None else data.dtype
