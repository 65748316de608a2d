"""New nodes for a graph, written in front of one that they replace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

Size = int | ir.SymbolicDim
Attributes = dict[str, int | float | str | Sequence[int]]


class Writer:
    """Writes nodes next to another one, as if they came from the same module.

    Args:
        graph: the graph.
        anchor: the node next to which they come, and which they may stand in for. They bear its metadata, and
            names that begin with its output's.
        behind: whether they come behind it, or before it.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, behind: bool = False) -> None:
        self.graph, self.anchor = graph, anchor
        self._behind = anchor if behind else None
        self._base = anchor.name or anchor.outputs[0].name
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"{self.anchor.outputs[0].name}.{self._count}"

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        shape: Iterable[Size] | None,
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """The output of a new node.

        Args:
            kind: operator of the default domain.
            inputs: what it reads.
            shape: of its output; None if unknown.
            attributes: by name.
        """
        name = self._name()
        node = ir.node(kind, inputs, attributes, name=f"{self._base}/{kind}.{self._count}")
        node.metadata_props.update(self.anchor.metadata_props)
        output = node.outputs[0]
        output.name = name
        if self.anchor.outputs[0].dtype is not None:
            output.dtype = self.anchor.outputs[0].dtype
        output.shape = None if shape is None else ir.Shape(shape)
        if self._behind is None:
            self.graph.insert_before(self.anchor, node)
        else:
            self.graph.insert_after(self._behind, node)
            self._behind = node
        return output

    def constant(self, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = self._name()
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.initializers[name] = value
        return value

    def replace(self, value: ir.Value) -> None:
        """Let the users of the old node's output read ``value``, and remove the node."""
        ir.convenience.replace_all_uses_with(self.anchor.outputs[0], value)
        self.graph.remove(self.anchor, safe=True)
