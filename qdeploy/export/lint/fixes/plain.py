"""Fixes that do not concern quantization: attributes, versions, constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from qdeploy.export.graph import store
from qdeploy.export.graph.quantizer import quantizers, readable
from qdeploy.export.lint.fixes import Fix
from qdeploy.export.lint.rules.graph import foldable_node
from qdeploy.export.lint.rules.types import parser_limits

# Each has one correctly rounded result, so that folding is exact.
_EXACT = (
    *(
        "Cast",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Slice",
        "Gather",
        "Concat",
        "Split",
    ),
    *("Shape", "Size", "Expand", "Tile", "Range", "Where", "Equal", "Greater", "Less", "Not", "And", "Or"),
    *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Floor", "Ceil", "Min", "Max", "Mod"),
)
_LARGEST = 2**24  # elements of a result that is stored


class NoPrecision(Fix):
    """A Q loses its ``precision`` where that is the type it reads, so that it says nothing new."""

    rule = "TRT017"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            precision = q.node.attributes.get("precision")
            kinds = {q.data.dtype, q.scale.dtype if q.scale is not None else None}
            if precision is not None and kinds == {ir.DataType(precision.as_int())}:
                del q.node.attributes["precision"]
                modified = True
        return PassResult(model, modified)


class KnownVersion(Fix):
    """The IR version becomes the newest that the parser knows; nothing in it says what is computed.

    It does not fire below what the graph's opset needs.
    """

    rule = "TRT046"

    def call(self, model: ir.Model) -> PassResult:
        newest_opset, newest = parser_limits(self.scope.tensorrt)
        if (model.ir_version or 0) <= newest or model.opset_imports.get("", 0) > newest_opset:
            return PassResult(model, False)
        model.ir_version = newest
        return PassResult(model, True)


class Folded(Fix):
    """Identity and needless Cast go; what is computed from constants, exactly, is stored."""

    rule = "TRT044"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if not foldable_node(node) or any(value.is_graph_output() for value in node.outputs):
                continue
            if node.op_type == "Identity" or (node.op_type == "Cast" and readable(node.inputs[0]) is None):
                source = node.inputs[0]
                if node.op_type == "Cast" and source is not None and source.dtype != node.outputs[0].dtype:
                    before = source.producer()
                    source = before.inputs[0] if before is not None else None
                if source is None:
                    continue
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
            elif node.op_type in _EXACT and (results := _computed(model, node)) is not None:
                for value, result in zip(node.outputs, results):
                    ir.convenience.replace_all_uses_with(value, store(model, value.name or "folded", result))
            else:
                continue
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified)


def _computed(model: ir.Model, node: ir.Node) -> list[Any] | None:
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or not shape.is_static():
            return None
        begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end")
        return [np.array(shape.numpy()[begin:end], np.int64)]
    feed = {value.name or "": readable(value) for value in node.inputs if value is not None}
    run = ReferenceEvaluator(ir.to_proto(node), opsets=dict(model.opset_imports))
    results = [np.asarray(result) for result in run.run(None, feed)]
    return results if all(result.size <= _LARGEST for result in results) else None
