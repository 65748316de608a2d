"""Multiplications of a graph, and which of them are meant to be int8's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from qdeploy.export.graph.file import read
from qdeploy.export.graph.network import Network
from qdeploy.export.graph.nodes import INTEGER_PRODUCT, WEIGHTED, upstream
from qdeploy.export.graph.quantizer import FP8, read_quantizer


def graph_macs(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Multiply-accumulates of every Conv, Gemm and MatMul by the name of its node, attention included.

    Args:
        path: the ONNX file; its external weights are not read.
        shapes: shapes of its inputs.

    Raises:
        InvalidInputError: the file is no ONNX graph, or the size of a node cannot be inferred.
    """
    return Network(path, shapes).macs()


def meant_int8(path: Path) -> set[str]:
    """Names of the nodes that were quantized to run as int8: both of their inputs are or come from integers.

    Raises:
        InvalidInputError: the file is no ONNX graph.
    """

    def from_integers(value: ir.Value | None) -> bool:
        found = read_quantizer(upstream(value))
        return found is not None and not found.quantizes and found.codes != FP8

    nodes = list(read(path).graph)
    return {
        node.name or ""
        for node in nodes
        if node.op_type == INTEGER_PRODUCT
        or (node.op_type in WEIGHTED and all(from_integers(value) for value in node.inputs[:2]))
    }
