"""Codes and their types: int8 made explicit, unsigned codes shifted, floats stored as codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from qdeploy.export.graph import store
from qdeploy.export.graph.quantizer import INT8, Quantizer, dequantized, quantizers, readable, spread
from qdeploy.export.lint.fixes import Fix


class NamedCodes(Fix):
    """A Q whose ``output_dtype`` is INT8 gets a zero point of that type instead.

    It does not fire where the Q names no type: by the standard that is uint8, another function.
    """

    rule = "TRT003"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            if not q.quantizes or q.zero_point is not None or "output_dtype" not in q.node.attributes:
                continue
            scales = readable(q.scale)
            if q.codes != INT8 or scales is None:
                continue
            zero = store(model, f"{q.output.name}.zero_point", np.zeros(scales.shape, np.int8))
            q.node.resize_inputs(3)
            q.node.replace_input_with(2, zero)
            del q.node.attributes["output_dtype"]
            modified = True
        return PassResult(model, modified)


class SignedCodes(Fix):
    """uint8 codes around 128 become int8 codes around 0.

    1. A Q with zero point 128 whose readers are all DQ with zero point 128; or a DQ of a stored tensor.
    2. Then all zero points are int8 zeros, and stored codes are 128 less.
    """

    rule = "TRT002"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        found = {id(q.node): q for q in quantizers(model)}
        for q in list(found.values()):
            if not _around_128(q):
                continue
            if q.quantizes:
                readers = [found.get(id(node)) for node, _ in q.output.uses()]
                if q.output.is_graph_output() or not all(r and _around_128(r) for r in readers):
                    continue
                for each in (q, *readers):
                    if each is not None:
                        _centre(model, each)
                q.output.dtype = INT8
                modified = True
            elif (codes := readable(q.data)) is not None and codes.dtype == np.uint8:
                shifted = (codes.astype(np.int16) - 128).astype(np.int8)
                q.node.replace_input_with(0, store(model, f"{q.data.name}.int8", shifted))
                _centre(model, q)
                modified = True
        return PassResult(model, modified)


def _around_128(q: Quantizer) -> bool:
    zeros = readable(q.zero_point)
    return zeros is not None and zeros.dtype == np.uint8 and bool((zeros == 128).all())


def _centre(model: ir.Model, q: Quantizer) -> None:
    zeros = readable(q.zero_point)
    name = q.zero_point.name if q.zero_point is not None else "zero_point"
    q.node.replace_input_with(2, store(model, f"{name}.int8", np.zeros(zeros.shape, np.int8)))


class StoredCodes(Fix):
    """A stored float tensor behind a Q becomes its int8 codes.

    They are rounded as QuantizeLinear rounds: half to even, after a division in float32. It does not fire
    on block scales and other types.
    """

    rule = "TRT033"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            values, scales = readable(q.data), readable(q.scale)
            if not q.quantizes or values is None or scales is None or q.output.is_graph_output():
                continue
            # Without a zero point the standard and TensorRT disagree on the type.
            if q.codes != INT8 or q.blocked or q.zero_point is None or readable(q.zero_point) is None:
                continue
            scales, zeros = (
                spread(q, numbers.astype(np.float32), values.shape)
                for numbers in (scales, readable(q.zero_point))
            )
            codes = np.rint(values.astype(np.float32) / scales) + zeros
            stored = store(model, f"{q.data.name}.codes", np.clip(codes, -128, 127).astype(np.int8))
            ir.convenience.replace_all_uses_with(q.output, stored)
            model.graph.remove(q.node, safe=True)
            modified = True
        return PassResult(model, modified)


class StoredBias(Fix):
    """A bias that comes from codes becomes its float values.

    The DQ of stored codes at the third input of a layer is removed: ONNX Runtime's quantizer writes such biases,
    in int32.
    """

    rule = "TRT019"

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for q in quantizers(model):
            values = None if q.quantizes or q.blocked else dequantized(q)
            if values is None or values.ndim != 1:
                continue
            uses = [(node, position) for node, position in q.output.uses() if position == 2]
            if not uses or any(node.op_type not in ("Conv", "ConvTranspose", "Gemm") for node, _ in uses):
                continue
            stored = store(model, f"{q.data.name}.float", values.astype(q.scales.dtype))
            for node, position in uses:
                node.replace_input_with(position, stored)
            modified = True
        return PassResult(model, modified)
