"""Graphs on disk."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qdeploy.export.graph.external import check_external
from qdeploy.export.graph.nodes import label
from qdeploy.system.errors import InvalidInputError

LARGE = 2**30  # bytes of initializers above which they go to a file of their own


def read(path: Path) -> ir.Model:
    """Read a graph with its functions inlined and its nodes in topological order; weights stay in their files.

    Raises:
        InvalidInputError: the file is no ONNX graph, its nodes form a cycle or read values that nothing makes, or it
            reads weights from elsewhere.
    """
    check_external(path)
    try:
        model = ir.load(path)
        if model.functions:
            InlinePass()(model)
        model.graph.sort()
    except Exception as error:  # protobuf's and the reader's errors have no common base
        raise InvalidInputError(f"{path} is damaged or no ONNX graph") from error
    if not model.ir_version or not len(model.graph):
        raise InvalidInputError(f"{path} is damaged or no ONNX graph: it holds no node")
    known = {id(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and id(value) not in known:
                raise InvalidInputError(
                    f"{path} is damaged: {label(node)} reads {value.name!r}, which nothing in the graph makes"
                )
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a graph and check it: the full checker, with strict shape inference.

    Raises:
        InvalidInputError: the graph is not valid ONNX.
    """
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, path, external_data=f"{path.name}_data" if size > LARGE else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidInputError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
