"""Turn pixels into tokens, and back, by one transposition of the four-dimensional tensor."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import producer
from qdeploy.export.graph.writer import Writer


class PixelsAsTokens(InPlacePass):
    """Transpose ``[N, C, H, W]`` to ``[N, H, W, C]`` before it becomes ``[N, HW, C]``, and the reverse.

    Attention reads tokens of C channels. Where convolutions keep channels last, the tensor is in this
    order in memory already, and a transposition of the four axes moves nothing. Once H and W are one axis, engines
    no longer know, so that ``[N, C, HW]`` is written out and then transposed.

    1. GroupNormalization of ``Reshape(x)``, x ``[N, C, H, W]`` and the reshaped one ``[N, C, HW]``: the
       Reshape moves behind it.
    2. ``Transpose(Reshape(x), (0, 2, 1))`` with such a Reshape becomes ``Reshape(Transpose(x, (0, 2, 3, 1)))``.
    3. ``Reshape(Transpose(y, (0, 2, 1)))`` to ``[N, C, H, W]``, y ``[N, HW, C]``, becomes
       ``Transpose(Reshape(y), (0, 3, 1, 2))``.

    It does not fire where C, H or W is unknown, where N and C do not keep their places, nor where a tensor that
    is removed is an output of the graph. A Reshape or Transpose with other users stays for them.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            rule = {"GroupNormalization": _norm, "Transpose": _to_tokens, "Reshape": _to_pixels}
            if node.op_type in rule and not node.outputs[0].is_graph_output():
                modified |= rule[node.op_type](model, node)
        return PassResult(model, modified)


def _sizes(value: ir.Value | None, rank: int) -> list[int] | None:
    """All sizes but the first, if the value has that rank and they are known."""
    if value is None or value.shape is None or value.shape.rank() != rank:
        return None
    sizes = [size for size in list(value.shape)[1:] if isinstance(size, int)]
    return sizes if len(sizes) == rank - 1 else None


def _flattened(value: ir.Value | None) -> tuple[ir.Node, ir.Value, list[int]] | None:
    """The Reshape from ``x`` of ``[N, C, H, W]`` to a value of ``[N, C, HW]``, ``x``, and its C, H and W."""
    node = producer(value)
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    flat, image = _sizes(value, 3), _sizes(node.inputs[0], 4)
    if flat is None or image is None or flat != [image[0], image[1] * image[2]]:
        return None
    return node, node.inputs[0], image


def _norm(model: ir.Model, node: ir.Node) -> bool:
    flattened = _flattened(node.inputs[0])
    if flattened is None:
        return False
    reshape, x, _ = flattened
    write = Writer(model, node)
    attributes, like = (
        {name: attribute.value for name, attribute in one.attributes.items()} for one in (node, reshape)
    )
    normal = write.node("GroupNormalization", x, *node.inputs[1:], shape=x.shape, dtype=x.dtype, **attributes)
    flat = write.node(
        "Reshape", normal, reshape.inputs[1], shape=reshape.outputs[0].shape, dtype=x.dtype, **like
    )
    write.replace(node.outputs[0], flat)
    return True


def _swaps(node: ir.Node) -> bool:
    """Whether a node swaps the last two of three axes."""
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    return tuple(node.attributes["perm"].as_ints()) == (0, 2, 1)


def _to_tokens(model: ir.Model, node: ir.Node) -> bool:
    flattened = _flattened(node.inputs[0])
    if flattened is None or not _swaps(node):
        return False
    _, x, (c, h, w) = flattened
    n = _rows(x)
    write = Writer(model, node)
    last = write.node("Transpose", x, shape=(n, h, w, c), dtype=x.dtype, perm=(0, 2, 3, 1))
    tokens = write.node("Reshape", last, _shape(write, h * w, c), shape=(n, h * w, c), dtype=x.dtype)
    write.replace(node.outputs[0], tokens)
    return True


def _to_pixels(model: ir.Model, node: ir.Node) -> bool:
    transpose = producer(node.inputs[0])
    flat, image = _sizes(node.inputs[0], 3), _sizes(node.outputs[0], 4)
    if transpose is None or not _swaps(transpose) or flat is None or image is None:
        return False
    c, h, w = image
    if flat != [c, h * w]:
        return False
    n = _rows(node.outputs[0])
    write, kind = Writer(model, node), node.outputs[0].dtype
    last = write.node("Reshape", transpose.inputs[0], _shape(write, h, w, c), shape=(n, h, w, c), dtype=kind)
    pixels = write.node("Transpose", last, shape=(n, c, h, w), dtype=kind, perm=(0, 3, 1, 2))
    write.replace(node.outputs[0], pixels)
    return True


def _rows(value: ir.Value) -> int | ir.SymbolicDim:
    assert value.shape is not None
    return value.shape[0]


def _shape(write: Writer, *sizes: int) -> ir.Value:
    return write.constant(np.array([0, *sizes], np.int64))
