"""Small questions to an ONNX graph, and the way it goes to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from qdeploy.system.errors import InvalidInputError

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul", "MatMulIntegerToFloat")
LARGE = 2**30  # bytes of initializers above which they go to a file of their own


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, if any does."""
    return value.producer() if value is not None else None


def constant(value: ir.Value | None) -> Any:
    """A constant's values as a numpy array; None if the value is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def block_size(node: ir.Node) -> int:
    """Elements that share a scale of a Q or DQ; 0 if it has no blocks."""
    attribute = node.attributes.get("block_size")
    return 0 if attribute is None else int(attribute.as_int())


def save(graph: ir.Model, path: Path) -> None:
    """Write a graph and check it: the full checker, with strict shape inference.

    Raises:
        InvalidInputError: the graph is not valid ONNX.
    """
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    ir.save(graph, path, external_data=f"{path.name}_data" if size > LARGE else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidInputError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
