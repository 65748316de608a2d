"""Positions of Q and DQ: steps between a DQ and its layer move before the Q, repeated pairs are removed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from qdeploy.export.graph import MOVES, WEIGHTED, producer, store
from qdeploy.export.graph.quantizer import Quantizer, quantizers, read_quantizer, readable
from qdeploy.export.lint.fixes import Fix

# They move numbers and compute none: rounding before or after is the same.
_MOVES = (*MOVES, "Slice", "Expand", "Gather")


class StepsBeforeQuantizer(Fix):
    """``Q, DQ, step, layer`` becomes ``step, Q, DQ, layer``.

    1. A DQ per tensor, of a Q with the same scale, each read once.
    2. What reads it moves numbers; or it pads with zeros and the zero point is 0.
    3. Then the step moves before the Q.
    4. A Cast to 16 bits is removed instead: the DQ's scale gets that type, where it can hold the scale exactly.
       Codes of 8 bits times a scale of 11 bits are exact in float32, so both round once, in the same way.

    Transpose and Reshape right before a layer stay: TensorRT moves them itself.
    """

    rule = "TRT023"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            uses = list(q.output.uses())
            if q.quantizes or len(uses) != 1 or q.output.is_graph_output() or uses[0][1] != 0:
                continue
            step = uses[0][0]
            if step.outputs[0].is_graph_output() or not _reaches_layer(step):
                continue
            if step.op_type == "Cast":
                modified |= _cast_scale(model, q, step)
            elif _moves(step, q):
                modified |= _swap(q, step)
        return PassResult(model, modified)


def _reaches_layer(step: ir.Node) -> bool:
    """Whether a step that TensorRT does not move itself is on the way to a layer."""
    others, node = step.op_type not in ("Transpose", "Reshape"), step
    while len(uses := list(node.outputs[0].uses())) == 1:
        node = uses[0][0]
        if node.op_type in WEIGHTED:
            return others
        if node.op_type not in (*_MOVES, "Cast", "Pad", "Mul", "Div"):
            return False
        others |= node.op_type not in ("Transpose", "Reshape")
    return False


def _moves(step: ir.Node, q: Quantizer) -> bool:
    if step.op_type == "Pad":
        mode = step.attributes.get_string("mode", "constant")
        value = (
            readable(step.inputs[2]) if len(step.inputs) > 2 and step.inputs[2] is not None else np.zeros(1)
        )
        zeros = readable(q.zero_point) if q.zero_point is not None else np.zeros(1)
        return mode != "constant" or (
            value is not None and not value.any() and zeros is not None and not zeros.any()
        )
    return step.op_type in _MOVES


def _swap(dequantize: Quantizer, step: ir.Node) -> bool:
    quantize = read_quantizer(producer(dequantize.data))
    if quantize is None or not quantize.quantizes or len(list(quantize.output.uses())) != 1:
        return False
    if dequantize.per_channel or dequantize.blocked or not quantize.same_grid(dequantize):
        return False
    earlier = read_quantizer(producer(quantize.data))
    if earlier is not None and earlier.same_grid(quantize):
        return False  # a repeated pair: without it the step moves before the first Q
    moved, source = step.outputs[0], quantize.data
    ir.convenience.replace_all_uses_with(moved, dequantize.output)
    step.replace_input_with(0, source)
    quantize.node.replace_input_with(0, moved)
    quantize.output.shape = dequantize.output.shape = moved.shape
    if source.dtype is not None:
        moved.dtype = source.dtype
    return True


def _cast_scale(model: ir.Model, q: Quantizer, cast: ir.Node) -> bool:
    kind = ir.DataType(cast.attributes["to"].as_int())
    scales = readable(q.scale)
    opset = model.opset_imports.get("", 0)
    if kind != ir.DataType.FLOAT16 or scales is None or scales.dtype != np.float32 or opset < 19:
        return False
    half = scales.astype(np.float16)
    if (half.astype(np.float32) != scales).any() or "output_dtype" in q.node.attributes:
        return False
    q.node.replace_input_with(1, store(model, f"{q.output.name}.scale", half))
    q.output.dtype = kind
    ir.convenience.replace_all_uses_with(cast.outputs[0], q.output)
    model.graph.remove(cast, safe=True)
    return True


class RepeatedPairs(Fix):
    """``Q, DQ, Q`` with one scale becomes ``Q``: what lies on a grid rounds to itself."""

    rule = "TRT032"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            before = read_quantizer(producer(q.data))
            if not q.quantizes or before is None or before.quantizes or q.output.is_graph_output():
                continue
            # Along an axis, equal numbers still have to belong to equal channels.
            if before.per_channel or before.blocked or not before.same_grid(q):
                continue
            if before.data.dtype is not None and q.output.dtype not in (None, before.data.dtype):
                continue
            ir.convenience.replace_all_uses_with(q.output, before.data)
            model.graph.remove(q.node, safe=True)
            modified = True
        return PassResult(model, modified)
