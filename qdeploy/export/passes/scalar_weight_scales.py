"""Quantized convolutions whose results TensorRT for RTX keeps in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.quantizer import FP8, INT8, Quantizer, read_quantizer
from qdeploy.export.graph.writer import Writer

# The largest codes of activations.
_LARGEST = {INT8: 128.0, FP8: 448.0}
# Half of the largest half: the rest is for the rounding of a sum of thousands.
_ROOM = 65504.0 / 2


class ScalarWeightScales(InPlacePass):
    """``Conv(x, DQ(codes, scales)) + bias`` becomes ``Conv(x, DQ(codes, s)) * (scales / s) + bias``, s one number.

    With a weight scale for each output channel, the builder lets the int8 or fp8 convolution write float32, and
    multiplies the scales in the next kernel: four bytes an element where 16 bits take two. With one scale, the
    convolution writes 16 bits, and the ratios are multiplied by the pointwise kernel that follows anyway.

    1. The weight of a Conv comes from a DequantizeLinear of constant int8 or fp8 codes with a constant scale for each
       output channel, and its input from a DequantizeLinear with one constant scale.
    2. ``s`` is the largest of the scales: no ratio exceeds 1, and none makes a result smaller than it would be.
    3. Where a result could then exceed half of half precision's range before its ratio brings it back, ``s`` is
       reduced until none can, whatever the codes of the input are.

    It does not fire where the convolution's bias is computed, or its scales are equal already.
    """

    def call(self, model: ir.Model) -> PassResult:
        found = [scaled for node in model.graph if (scaled := _scaled(node)) is not None]
        for scaled in found:
            _rewrite(model, scaled)
        return PassResult(model, bool(found))


@dataclass(frozen=True)
class _Scaled:
    """A convolution that the rule applies to.

    Attributes:
        conv: the node.
        weight: the DequantizeLinear of its weight.
        scales: ``[out]``.
        scale: the number ``s``.
        bias: ``[out]``, or None.
    """

    conv: ir.Node
    weight: ir.Node
    scales: Any
    scale: np.float32
    bias: Any


def _scaled(node: ir.Node) -> _Scaled | None:
    if node.op_type != "Conv":
        return None
    weight, x = (_dequantizer(node.inputs[side]) for side in (1, 0))
    if weight is None or x is None or weight.codes != x.codes or weight.codes not in _LARGEST:
        return None
    codes, scales, step = constant(weight.data), weight.scales, x.scales
    if codes is None or scales is None or step is None or step.size != 1 or weight.blocked:
        return None
    scales = scales.astype(np.float32)
    if scales.size != codes.shape[0] or weight.axis != 0 or (scales == scales[0]).all():
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return None
    sums = np.abs(codes.astype(np.float32)).reshape(len(codes), -1).sum(1)
    largest = float(sums.max()) * _LARGEST[weight.codes] * float(step)
    scale = min(float(scales.max()), _ROOM / largest) if largest > 0 else float(scales.max())
    return _Scaled(node, weight.node, scales, np.float32(scale), constant(bias))


def _dequantizer(value: ir.Value | None) -> Quantizer | None:
    node = producer(value)
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    shape = node.inputs[0].shape
    return read_quantizer(node, None if shape is None else shape.rank())


def _rewrite(model: ir.Model, scaled: _Scaled) -> None:
    conv, old = scaled.conv, scaled.weight
    after = Writer(model, conv, behind=True)
    zero = old.inputs[2] if len(old.inputs) > 2 else None
    inputs = [old.inputs[0], after.constant(scaled.scale, "weight_scale")]
    if zero is not None:
        inputs.append(_first(model, zero))
    weight = ir.node("DequantizeLinear", inputs, name=f"{conv.name}/weight_dq")
    weight.outputs[0].name = f"{conv.outputs[0].name}.weight"
    weight.outputs[0].shape, weight.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    model.graph.insert_before(conv, weight)
    conv.replace_input_with(1, weight.outputs[0])
    rank = conv.outputs[0].shape.rank() if conv.outputs[0].shape is not None else weight_rank(old)
    column = (1, -1, *[1] * (rank - 2))
    ratio = (scaled.scales / scaled.scale).astype(np.float32).reshape(column)
    shape = conv.outputs[0].shape
    result = conv.outputs[0]
    users = list(result.uses())
    final = after.node("Mul", result, after.constant(ratio, "weight_scale_ratios"), shape=shape)
    if scaled.bias is not None:
        conv.resize_inputs(2)
        bias = scaled.bias.astype(np.float32).reshape(column)
        final = after.node("Add", final, after.constant(bias, "bias"), shape=shape)
    if result.is_graph_output():
        name, result.name = result.name, f"{result.name}.products"
        final.name = name
        model.graph.outputs[model.graph.outputs.index(result)] = final
    for user, place in users:
        user.replace_input_with(place, final)


def weight_rank(dequantize: ir.Node) -> int:
    """Number of axes of a weight."""
    codes = constant(dequantize.inputs[0])
    assert codes is not None  # `_scaled` has read it
    return int(codes.ndim)


def _first(model: ir.Model, zero: ir.Value) -> ir.Value:
    """The zero point of one scale, which is 0 as all of them are, in the type of the codes."""
    tensor = ir.convenience.get_const_tensor(zero)
    assert tensor is not None
    if tensor.shape.rank() == 0:
        return zero
    name = f"{zero.name}/one"
    initializers = model.graph.initializers
    if name not in initializers:
        one = ir.Tensor(tensor.numpy().reshape(-1)[:1].reshape(()), dtype=tensor.dtype, name=name)
        initializers[name] = ir.Value(
            name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=one
        )
    return initializers[name]
