"""Multiplications of a graph, and which of them are meant to be int8's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from qdeploy.system.errors import InvalidInputError

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# ONNX Runtime's product of integers with a float result.
INTEGER_PRODUCT = "MatMulIntegerToFloat"
# Operations that pass on the numbers they get.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")

# Operations that keep the shape, for which onnx (1.23) has no shape inference of its own, or none at all.
_SAME_SHAPE = (
    "GroupNormalization",
    *(f"TRT_{kind}{way}Linear" for kind in ("FP8", "INT4") for way in ("Quantize", "Dequantize")),
)


def graph_macs(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Multiply-accumulates of every Conv, Gemm and MatMul, attention included.

    Args:
        path: the ONNX file; its external weights are not read.
        shapes: shapes of all inputs.

    Returns:
        The count by the node's name.

    Raises:
        InvalidInputError: the file is no ONNX graph, or the size of a node cannot be derived.
    """
    nodes, known = graph_shapes(path, shapes)
    macs: dict[str, int] = {}
    for node in nodes:
        if node.op_type not in (*WEIGHTED, "MatMulInteger"):
            continue
        lacking = [name for name in (*node.input[:2], node.output[0]) if name not in known]
        if lacking:
            raise InvalidInputError(
                f"the size of {node.name} in {path.name} is unknown: {lacking[0]} has no shape"
            )
        macs[node.name] = macs_of(node, *(known[name] for name in (*node.input[:2], node.output[0])))
    return macs


def graph_shapes(
    path: Path, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
    """Nodes of a graph in their order, and the shapes of all tensors that follow from those of the inputs.

    Args:
        path: the ONNX file; its external weights are not read.
        shapes: shapes of all inputs.

    Raises:
        InvalidInputError: the file is no ONNX graph, or its shapes contradict each other.
    """
    graph = with_fixed_shapes(_load(path), shapes)
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            known[info.name] = tuple(dim.dim_value for dim in dims)
    return list(graph.node), known


def macs_of(node: Any, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]) -> int:
    """MACs of a node with inputs of shape x and w and an output of shape y."""
    if node.op_type == "Conv":
        return prod(y) * prod(w[1:])
    if node.op_type == "ConvTranspose":
        return prod(x) * prod(w[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(y) * (x[0] if transposed else x[-1])


def meant_int8(path: Path) -> set[str]:
    """Names of the nodes that were quantized to run as int8: both of their inputs are or come from integers.

    Raises:
        InvalidInputError: the file is no ONNX graph.
    """
    import onnx

    graph = _load(path).graph
    producer = {output: node for node in graph.node for output in node.output}
    float8 = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN}

    def from_integers(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in MOVES:
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear" and float8.isdisjoint(node.input)

    weighted = (node for node in graph.node if node.op_type in WEIGHTED)
    meant = {node.name for node in weighted if all(from_integers(name) for name in node.input[:2])}
    return meant | {node.name for node in graph.node if node.op_type == INTEGER_PRODUCT}


def _load(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise InvalidInputError(f"{path} is damaged or no ONNX graph") from error


def _spell_out_products(graph: Any) -> None:
    """MatMulIntegerToFloat as MatMulInteger and Cast, whose shapes onnx can infer."""
    import onnx

    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != INTEGER_PRODUCT:
            continue
        output = node.output[0]
        node.op_type, node.domain, node.output[0] = "MatMulInteger", "", f"{output}/sums"
        del node.input[2:]
        nodes.append(
            onnx.helper.make_node(
                "Cast", [node.output[0]], [output], f"{node.name}/Cast", to=onnx.TensorProto.FLOAT
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)


def with_fixed_shapes(model: Any, shapes: Mapping[str, Sequence[int]], strict: bool = False) -> Any:
    """The graph with shapes inferred anew from fixed shapes of its inputs; the model given is changed.

    Raises:
        InvalidInputError: shapes contradict each other; if not ``strict``, that may also pass unseen.
    """
    import onnx.shape_inference

    graph = model.graph
    for node in graph.node:
        if node.op_type in _SAME_SHAPE:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    _spell_out_products(graph)
    for port in graph.input:
        if port.name not in shapes:
            continue
        del port.type.tensor_type.shape.dim[:]
        for size in shapes[port.name]:
            port.type.tensor_type.shape.dim.add().dim_value = size
    # What the exporter wrote down holds for the symbolic batch, and would win over what is inferred.
    del graph.value_info[:]
    for port in graph.output:
        port.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=True).graph
    except Exception as error:
        raise InvalidInputError(f"the shapes in {graph.name!r} contradict each other: {error}") from error
