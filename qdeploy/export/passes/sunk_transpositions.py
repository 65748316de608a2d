"""Keep tensors channels-last between products that read and write them in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer

_UNARY = (
    "Sigmoid", "Tanh", "Relu", "Erf", "Gelu", "Sqrt", "Exp", "Neg", "Abs", "Cast", "HardSigmoid", "HardSwish", "Elu",
    "LeakyRelu", "Softplus", "Mish", "QuickGelu", "QuantizeLinear", "DequantizeLinear", "Clip", "Reciprocal",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max")


class SunkTranspositions(InPlacePass):
    """``f(to_first(x))`` becomes ``to_first(f(x))``, until a transposition back to channels-last meets it.

    A product of pixels leaves its result channels-last, [rows, ..., channels], and a transposition ``to_first``
    brings it into ONNX's order. Rules, for tensors of three or four axes:

    1. Operators on single elements, Q/DQ with one scale: f moves in front.
    2. The same with two inputs: the other is a number; or has ones for positions, and is reshaped; or has the
       same number of axes, and is transposed too.
    3. A Concat of channels, a ReduceMean over all positions, a Reshape that merges or cuts positions: the same,
       with axes and shape of the other order.
    4. ``to_last(to_first(x))`` becomes ``x``. Where all positions are ones, either is a Reshape; and a Reshape of
       a Reshape is one.

    Elements are moved, never computed again. It does not fire on other operators: there the transposition stays.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.graph is None:
                continue
            rule = _RULES.get(node.op_type)
            if rule is not None and len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
                modified |= rule(model, node)
        return PassResult(model, modified)


def to_first(rank: int) -> list[int]:
    """The permutation from channels-last to channels-first."""
    return [0, rank - 1, *range(1, rank - 1)]


def to_last(rank: int) -> list[int]:
    """The permutation from channels-first to channels-last."""
    return [0, *range(2, rank), 1]


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _behind(value: ir.Value | None) -> ir.Value | None:
    """x where the value is to_first(x), else None."""
    node = producer(value)
    if node is None or node.op_type != "Transpose":
        return None
    perm = _permutation(node)
    return node.inputs[0] if len(perm) in (3, 4) and perm == to_first(len(perm)) else None


def _last_shape(value: ir.Value | None) -> list[Any] | None:
    if value is None or value.shape is None:
        return None
    return [value.shape[axis] for axis in to_last(value.shape.rank())]


def _last(write: Writer, value: ir.Value | None) -> ir.Value | None:
    """A value of three or four axes channels-last; None where its shape is unknown."""
    if (known := _behind(value)) is not None:
        return known
    shape = _last_shape(value)
    if value is None or shape is None or len(shape) not in (3, 4):
        return None
    stored = constant(value)
    if stored is not None:
        return write.constant(stored.transpose(to_last(stored.ndim)))
    if all(size == 1 for size in shape[1:-1]) and isinstance(shape[-1], int):
        return _reshape(write, value, [0, *shape[1:]], shape)
    return write.node("Transpose", value, shape=shape, dtype=value.dtype, perm=to_last(len(shape)))


def _reshape(write: Writer, value: ir.Value, sizes: list[Any], shape: list[Any]) -> ir.Value:
    """A Reshape, of what the value is a Reshape of if it is one; 0 means the number of rows."""
    node = producer(value)
    if node is not None and node.op_type == "Reshape" and _keeps_rows(node):
        value = node.inputs[0]  # type: ignore[assignment]
    return write.node(
        "Reshape", value, write.constant(np.array(sizes, np.int64), "shape"), shape=shape, dtype=value.dtype
    )


def _keeps_rows(node: ir.Node) -> bool:
    """Whether a Reshape passes on its first axis."""
    sizes = constant(node.inputs[1])
    return sizes is not None and len(sizes) > 0 and sizes[0] == 0


def _sink(write: Writer, node: ir.Node, inputs: list[ir.Value | None], **changes: Any) -> bool:
    """Write the node on channels-last inputs, and a transposition behind it in its place."""
    output = node.outputs[0]
    attributes = {name: attribute for name, attribute in node.attributes.items() if name not in changes}
    written = ir.node(node.op_type, inputs, attributes=None, domain=node.domain)
    for name, attribute in attributes.items():
        written.attributes[name] = attribute
    for name, value in changes.items():
        written.attributes[name] = ir.AttrInt64(name, value)
    written.metadata_props.update(node.metadata_props)
    write.model.graph.insert_before(node, written)
    shape = _last_shape(output)
    if output.dtype is not None:
        written.outputs[0].dtype = output.dtype
    written.outputs[0].shape = None if shape is None else ir.Shape(shape)
    return _first(write, node, written.outputs[0])


def _first(write: Writer, node: ir.Node, last: ir.Value) -> bool:
    """Put to_first(last) in a node's place."""
    output = node.outputs[0]
    rank = last.shape.rank() if last.shape is not None else 4
    shape = None if output.shape is None else list(output.shape)
    write.replace(output, write.node("Transpose", last, shape=shape, dtype=output.dtype, perm=to_first(rank)))
    return True


def _unary(model: ir.Model, node: ir.Node) -> bool:
    last = _behind(node.inputs[0])
    if last is None or node.outputs[0].shape is None:
        return False
    if any(
        value is not None and (constant(value) is None or constant(value).size != 1)
        for value in node.inputs[1:]
    ):
        return False
    return _sink(Writer(model, node), node, [last, *node.inputs[1:]])


def _binary(model: ir.Model, node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    if shape is None or not any(_behind(value) is not None for value in node.inputs):
        return False
    ranks = [None if value is None or value.shape is None else value.shape.rank() for value in node.inputs]
    single = [
        value is not None and value.shape is not None and all(size == 1 for size in value.shape)
        for value in node.inputs
    ]
    for rank, number in zip(ranks, single, strict=True):
        if rank is None or rank > shape.rank() or (rank < shape.rank() and not number):
            return False
    write = Writer(model, node)
    ready = [
        value if number else _last(write, value) for value, number in zip(node.inputs, single, strict=True)
    ]
    return None not in ready and _sink(write, node, ready)


def _concat(model: ir.Model, node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    if shape is None or shape.rank() not in (3, 4) or node.attributes["axis"].as_int() % shape.rank() != 1:
        return False
    if not any(_behind(value) is not None for value in node.inputs):
        return False
    if any(value is None or value.shape is None for value in node.inputs):
        return False
    write = Writer(model, node)
    inputs = [_last(write, value) for value in node.inputs if value is not None]
    return _sink(write, node, list(inputs), axis=shape.rank() - 1)


def _mean(model: ir.Model, node: ir.Node) -> bool:
    last, output = _behind(node.inputs[0]), node.outputs[0]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if last is None or axes is None or output.shape is None or node.inputs[0].shape is None:  # type: ignore[union-attr]
        return False
    rank = node.inputs[0].shape.rank()  # type: ignore[union-attr]
    if output.shape.rank() != rank or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return False
    write = Writer(model, node)
    return _sink(write, node, [last, write.constant(np.arange(1, rank - 1), "axes")])


def _reshaped(model: ir.Model, node: ir.Node) -> bool:
    value, output = node.inputs[0], node.outputs[0]
    last = _behind(value)
    if last is None or value is None or value.shape is None or output.shape is None:
        return False
    before, after = list(value.shape), list(output.shape)
    write = Writer(model, node)
    if all(size == 1 for size in before[2:]):
        # Without positions both orders are one.
        if not _keeps_rows(node):
            return False
        sizes = constant(node.inputs[1])
        write.replace(output, _reshape(write, last, sizes.tolist(), after))
        return True
    known = all(isinstance(size, int) for size in (*before[1:], *after[1:]))
    if not known or before[:2] != after[:2] or len(after) not in (3, 4):
        return False
    shape = [after[0], *after[2:], after[1]]
    return _first(write, node, _reshape(write, last, [0, *shape[1:]], shape))


def _transposed(model: ir.Model, node: ir.Node) -> bool:
    perm = _permutation(node)
    last = _behind(node.inputs[0])
    if last is None or len(perm) not in (3, 4) or perm != to_last(len(perm)):
        return False
    Writer(model, node).replace(node.outputs[0], last)
    return True


_RULES: dict[str, Callable[[ir.Model, ir.Node], bool]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "Concat": _concat,
    "ReduceMean": _mean,
    "Reshape": _reshaped,
    "Transpose": _transposed,
}
