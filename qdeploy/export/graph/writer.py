"""New nodes and constants for a graph that is being rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir

from qdeploy.export.graph.nodes import add_initializer

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


class Writer:
    """Writes nodes next to a node, as part of the module that the node came from, with names that begin like its.

    Args:
        model: the model that is rewritten.
        place: the node that they are inserted before.
        behind: whether they are inserted after it instead.
    """

    def __init__(self, model: ir.Model, place: ir.Node, behind: bool = False) -> None:
        self.model, self.place = model, place
        self._behind = place if behind else None
        self._count = 0

    def node(
        self,
        operator: str,
        *inputs: ir.Value | None,
        shape: ir.Shape | Sequence[Any] | None = None,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node.

        Args:
            operator: its type.
            inputs: None for an input that is left out.
            shape: of the output, where it is known: integers, and symbolic sizes of other values.
            dtype: of the output.
            domain: the operator's; the model imports it.
            attributes: of the node.
        """
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        self._count += 1
        result = self.place.outputs[0].name
        name = f"{self.place.name or result}/{operator}.{self._count}"
        written = ir.node(operator, inputs, attributes, domain=domain, name=name)
        written.metadata_props.update(self.place.metadata_props)
        output = written.outputs[0]
        output.name = f"{result}.{self._count}"
        output.shape = None if shape is None else ir.Shape(list(shape))
        if dtype is not None:
            output.dtype = dtype
        if self._behind is None:
            self.model.graph.insert_before(self.place, written)
        else:
            self.model.graph.insert_after(self._behind, written)
            self._behind = written
        return output

    def constant(self, array: Any, name: str = "constant") -> ir.Value:
        """An initializer; equal content under one name is stored once."""
        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        described = f"{array.dtype.str}{array.shape}".encode()
        name = f"{name}/{sha256(described + array.tobytes()).hexdigest()[:12]}"
        existing = self.model.graph.initializers.get(name)
        return add_initializer(self.model, name, array) if existing is None else existing

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace a value by another for all its users, the graph's outputs included, and remove its node."""
        node = old.producer()
        assert node is not None
        if old.is_graph_output():
            name, old.name = old.name, None
            new.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
