"""One transposition for the keys of attention."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer

# A size in terms of another value's axis, counted from the front; or a number.
Axis = tuple[int, int] | int


class TransposedKeys(InPlacePass):
    """``Reshape(Transpose(Reshape(x), (0, 2, 1)))`` that swaps the last two axes becomes a Transpose.

    Torch's exporter writes attention's ``k^T`` for any rank: it folds the leading axes into one, swaps the
    other two, and unfolds, with shapes computed at run time. Engines recognise attention by a plain
    transposition, and fuse that with the split into heads before it.

    1. The first Reshape takes x of rank r to ``[-1, x[r-2], x[r-1]]``, the second one to
       ``[x[0], ..., x[r-3], x[r-1], x[r-2]]``; both shapes are computed from ``Shape(x)`` by Slice and Concat.
    2. The Transpose between them has the permutation (0, 2, 1).
    3. Then the three become ``Transpose(x)`` with the last two axes swapped.

    It does not fire where a shape is computed otherwise, nor where the last Reshape's output is one of the graph's.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            x = _swapped(node)
            if x is None or x.shape is None:
                continue
            shape = list(x.shape)
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            write = Writer(model, node)
            swapped = write.node(
                "Transpose", x, shape=[shape[axis] for axis in order], dtype=x.dtype, perm=order
            )
            write.replace(node.outputs[0], swapped)
            modified = True
        return PassResult(model, modified)


def _swapped(unfold: ir.Node) -> ir.Value | None:
    """The value whose last two axes a chain ending in this node swaps."""
    if unfold.op_type != "Reshape" or unfold.outputs[0].is_graph_output():
        return None
    swap = producer(unfold.inputs[0])
    if swap is None or swap.op_type != "Transpose" or "perm" not in swap.attributes:
        return None
    fold = producer(swap.inputs[0])
    if tuple(swap.attributes["perm"].as_ints()) != (0, 2, 1) or fold is None or fold.op_type != "Reshape":
        return None
    x = fold.inputs[0]
    if x is None or x.shape is None:
        return None
    rank = x.shape.rank()
    axes: list[Axis] = [(id(x), axis) for axis in range(rank)]
    folded, unfolded = [-1, *axes[-2:]], [*axes[:-2], axes[-1], axes[-2]]
    matches = _axes(fold.inputs[1]) == folded and _axes(unfold.inputs[1]) == unfolded
    return x if matches else None


def _axes(value: ir.Value | None) -> list[Axis] | None:
    """What the numbers of a computed shape are; None where they are unknown."""
    known = constant(value)
    if known is not None:
        return [int(size) for size in known.flatten()]
    node = producer(value)
    if node is None:
        return None
    if node.op_type == "Shape":
        x = node.inputs[0]
        if (
            x is None
            or x.shape is None
            or any(a.name == "end" or a.as_int() for a in node.attributes.values())
        ):
            return None
        return [(id(x), axis) for axis in range(x.shape.rank())]
    if node.op_type == "Concat":
        parts = [_axes(part) for part in node.inputs]
        return (
            None if any(part is None for part in parts) else [axis for part in parts for axis in part or ()]
        )
    if node.op_type == "Slice" and len(node.inputs) == 3:
        whole, begin, end = _axes(node.inputs[0]), constant(node.inputs[1]), constant(node.inputs[2])
        if whole is None or begin is None or end is None or begin.size != 1:
            return None
        return whole[int(begin.item()) : int(end.item())]
    return None
