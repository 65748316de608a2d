"""Rewrite complex arithmetic of a traced program as real arithmetic: ONNX has no complex numbers.

Rotary embeddings of many transformers (Qwen-Image, Lumina, Wan) multiply complex numbers. A complex tensor of
shape (...) becomes a real one of shape (..., 2), real and imaginary parts as in `torch.view_as_real`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from qdeploy.system.errors import InvalidInputError

aten = torch.ops.aten

Rewrite = Callable[["_Rewriter", Node], Any]


def complex_as_real(program: ExportedProgram) -> ExportedProgram:
    """The same program in real numbers; one without complex numbers is returned as it is.

    Args:
        program: of `torch.export.export`; its inputs and outputs are real.

    Raises:
        InvalidInputError: an operation on complex numbers has no rewrite here.
    """
    if not any(_is_complex(node) for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # into fewer operations: flatten is a view
    module = program.graph_module
    for values in (program.state_dict, program.constants):
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_complex():
                values[name] = torch.view_as_real(value.detach()).contiguous()
    _Rewriter(module).run()
    module.graph.eliminate_dead_code()
    module.recompile()
    return program


def _values(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, tuple | list) else [value]


def _is_complex(node: Node) -> bool:
    return any(isinstance(value, Tensor) and value.is_complex() for value in _values(node))


class _Rewriter:
    """Replaces each node that makes or reads complex numbers, in order; others are left alone."""

    def __init__(self, module: GraphModule) -> None:
        self.graph: Graph = module.graph
        self.rank: dict[Node, int] = {}  # of the complex tensor that a node stands for
        self.unchanged: list[Node] = []  # the parts of a complex tensor, read as a real tensor

    def run(self) -> None:
        for node in list(self.graph.nodes):
            reads = any(source in self.rank for source in node.all_input_nodes)
            if node.op == "placeholder" and _is_complex(node):
                self.rank[node] = node.meta["val"].ndim
                node.meta["val"] = torch.view_as_real(node.meta["val"])
            elif node.op == "call_function" and (reads or _is_complex(node)):
                self._replace(node)
        for node in self.unchanged:
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)

    def _replace(self, node: Node) -> None:
        rewrite = REWRITES.get(node.target)
        if rewrite is None:
            raise InvalidInputError(
                f"{node.target} has no form in real numbers, and ONNX has no complex ones"
            )
        was_complex, ranks = _is_complex(node), [getattr(value, "ndim", 0) for value in _values(node)]
        with self.graph.inserting_before(node):
            new = rewrite(self, node)
        if was_complex:
            self.rank[new] = ranks[0]
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def call(self, target: Any, *arguments: Any) -> Node:
        """A new node, with the value that the tracer would have noted for it."""
        node = self.graph.call_function(target, arguments)
        real = torch.fx.node.map_arg(arguments, lambda each: each.meta["val"])
        mode = next(
            value.fake_mode
            for source in node.all_input_nodes
            for value in _values(source)
            if hasattr(value, "fake_mode")
        )
        with mode:
            node.meta["val"] = target(*real)
        return node

    def real_factor(self, node: Any) -> Any:
        """A factor of a complex product: its two parts, or a real tensor with an axis for them."""
        if not isinstance(node, Node) or node in self.rank or not isinstance(node.meta["val"], Tensor):
            return node
        return self.call(aten.unsqueeze.default, node, -1)

    def part(self, node: Node, index: int) -> Node:
        return self.call(aten.select.int, node, -1, index)

    def pair(self, real: Node, imaginary: Node) -> Node:
        return self.call(aten.stack.default, [real, imaginary], -1)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _same(rewriter: _Rewriter, node: Node) -> Node:
    """Another node for the same numbers: the one is complex, the other real."""
    new = rewriter.call(aten.alias.default, _source(node))
    rewriter.unchanged.append(new)
    return new


def _elementwise(rewriter: _Rewriter, node: Node) -> Node:
    """The same operation on both parts."""
    return rewriter.call(node.target, *node.args)


def _along(position: int) -> Rewrite:
    """An operation along one axis, which is counted without the axis of the parts."""

    def rewrite(rewriter: _Rewriter, node: Node) -> Node:
        arguments = list(node.args) + [0] * (position + 1 - len(node.args))
        first = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
        assert isinstance(first, Node)
        arguments[position] = _axis(arguments[position], rewriter.rank[first], node.target)
        return rewriter.call(node.target, *arguments)

    return rewrite


def _axis(axis: Any, rank: int, target: Any) -> int:
    grows = target in (aten.unsqueeze.default, aten.stack.default)
    return int(axis) if axis >= 0 else int(axis) + rank + grows


def _with_parts(size: int) -> Rewrite:
    """A new shape, or repetitions, with the axis of the parts behind."""

    def rewrite(rewriter: _Rewriter, node: Node) -> Node:
        source, sizes, *rest = node.args
        assert isinstance(sizes, list | tuple)
        return rewriter.call(node.target, source, [*sizes, size], *rest)

    return rewrite


def _permute(rewriter: _Rewriter, node: Node) -> Node:
    source, axes = node.args
    assert isinstance(source, Node)
    assert isinstance(axes, list | tuple)
    rank = rewriter.rank[source]
    return rewriter.call(node.target, source, [*(_axis(axis, rank, node.target) for axis in axes), rank])


def _transpose(rewriter: _Rewriter, node: Node) -> Node:
    source, *axes = node.args
    assert isinstance(source, Node)
    return rewriter.call(
        node.target, source, *(_axis(axis, rewriter.rank[source], node.target) for axis in axes)
    )


def _multiply(rewriter: _Rewriter, node: Node) -> Node:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i; by a real number, both parts alike."""
    left, right = node.args
    if not (left in rewriter.rank and right in rewriter.rank):
        return rewriter.call(node.target, rewriter.real_factor(left), rewriter.real_factor(right))
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    a, b = rewriter.part(left, 0), rewriter.part(left, 1)
    c, d = rewriter.part(right, 0), rewriter.part(right, 1)
    times = aten.mul.Tensor
    real = rewriter.call(aten.sub.Tensor, rewriter.call(times, a, c), rewriter.call(times, b, d))
    imaginary = rewriter.call(aten.add.Tensor, rewriter.call(times, a, d), rewriter.call(times, b, c))
    return rewriter.pair(real, imaginary)


def _add(rewriter: _Rewriter, node: Node) -> Node:
    if not all(side in rewriter.rank for side in node.args):
        raise InvalidInputError("the sum of a complex and a real tensor has no form in real numbers here")
    return rewriter.call(node.target, *node.args)


def _conjugate(rewriter: _Rewriter, node: Node) -> Node:
    source = _source(node)
    negative = rewriter.call(aten.neg.default, rewriter.part(source, 1))
    return rewriter.pair(rewriter.part(source, 0), negative)


def _polar(rewriter: _Rewriter, node: Node) -> Node:
    length, angle = node.args
    parts = (rewriter.call(turn.default, angle) for turn in (aten.cos, aten.sin))
    return rewriter.pair(*(rewriter.call(aten.mul.Tensor, length, part) for part in parts))


def _length(rewriter: _Rewriter, node: Node) -> Node:
    source = _source(node)
    squares = rewriter.call(aten.mul.Tensor, source, source)
    return rewriter.call(aten.sqrt.default, rewriter.call(aten.sum.dim_IntList, squares, [-1]))


REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys(
        (
            aten.view_as_complex.default,
            aten.view_as_real.default,
            aten._to_copy.default,
            aten.to.dtype,
            aten.contiguous.default,
            aten.lift_fresh_copy.default,
            aten.detach.default,
            aten.alias.default,
            aten._assert_tensor_metadata.default,  # says that a value is complex; nothing reads it
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.neg.default,
            aten.index.Tensor,  # indices stand for leading axes
            operator.getitem,
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.slice.Tensor,
            aten.select.int,
            aten.index_select.default,
            aten.unbind.int,
        ),
        _along(1),
    ),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _along(1)),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default), _along(2)),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
        _with_parts(2),
    ),
    aten.repeat.default: _with_parts(1),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.conj.default: _conjugate,
    aten._conj.default: _conjugate,
    aten.resolve_conj.default: _same,
    aten.polar.default: _polar,
    aten.complex.default: lambda rewriter, node: rewriter.pair(*node.args),  # type: ignore[arg-type]
    aten.real.default: lambda rewriter, node: rewriter.part(_source(node), 0),
    aten.imag.default: lambda rewriter, node: rewriter.part(_source(node), 1),
    aten.abs.default: _length,
}
