"""What a build has to know of an ONNX graph before TensorRT sees it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qdeploy.system.errors import InvalidInputError

# Quantized types by the name of the member of ``onnx.TensorProto``, and those that TensorRT has on GPUs.
_LOW_BIT = {"INT8": "int8", "FLOAT8E4M3FN": "fp8", "INT4": "int4", "FLOAT4E2M1": "fp4"}
_REFUSED = ("UINT8", "INT16", "UINT16", "UINT4", "FLOAT8E5M2")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class GraphTensor:
    """An input or output: torch's name of its type, and its axes, a symbol's name where any size is welcome."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dynamic(self) -> bool:
        """Whether an axis has no fixed size."""
        return any(isinstance(size, str) for size in self.shape)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph from outside.

    Attributes:
        inputs: its inputs, without initializers.
        outputs: its outputs.
        opset: version of ONNX's own operators.
        low_bit: the low-bit types of its Q/DQ: ``int8``, ``fp8``, ``int4``, ``fp4``.
        weight_bytes: size of all initializers.
    """

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    opset: int
    low_bit: frozenset[str]
    weight_bytes: int


def read_graph(path: Path, refuse: bool = True) -> Graph:
    """Describe an ONNX file; external weights are not read.

    Args:
        path: the file.
        refuse: refuse quantized types without kernels, before the library does.

    Raises:
        InvalidInputError: it is no ONNX graph, or quantized in a way that TensorRT has no kernels for.
    """
    import onnx

    from qdeploy.export.graph.nodes import FLOAT4

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise InvalidInputError(f"{path} is damaged or no ONNX graph") from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    float4 = {node.output[0] for node in model.graph.node if node.op_type == FLOAT4}
    low_bit = set()
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == FLOAT4:
            low_bit.add("fp4")
        if node.op_type not in _QUANTIZERS or scales.intersection(node.output) or node.input[0] in float4:
            continue
        # Without a zero point, DequantizeLinear takes the type of its codes, QuantizeLinear makes uint8.
        typed = node.input[2] if len(node.input) > 2 else node.input[0]
        default = onnx.TensorProto.UINT8 if node.op_type == "QuantizeLinear" else onnx.TensorProto.INT8
        kind = constants[typed].data_type if typed in constants else default
        name = onnx.TensorProto.DataType.Name(kind)
        if refuse and name in _REFUSED:
            raise InvalidInputError(
                f"{node.name or node.op_type} in {path.name} is quantized to {name.lower()}, but TensorRT takes "
                "symmetric int8, int4 and fp8 only: calibrate for the target portable"
            )
        low_bit.add(_LOW_BIT.get(name, name.lower()))
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}
    weights = sum(
        prod(tensor.dims) * bits.get(name, 8 * _itemsize(tensor.data_type)) // 8
        for tensor in model.graph.initializer
        for name in (onnx.TensorProto.DataType.Name(tensor.data_type),)
    )
    return Graph(
        tuple(_tensor(port, path) for port in model.graph.input if port.name not in constants),
        tuple(_tensor(port, path) for port in model.graph.output),
        next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")),
        frozenset(low_bit),
        weights,
    )


def _itemsize(data_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _tensor(port: Any, path: Path) -> GraphTensor:
    import onnx

    kind = port.type.tensor_type
    if not kind.HasField("shape"):
        raise InvalidInputError(f"{port.name!r} in {path.name} has no shape: export it again")
    sizes = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{port.name}[{axis}]"
        for axis, dim in enumerate(kind.shape.dim)
    )
    names = {"FLOAT": "float32", "FLOAT16": "float16", "DOUBLE": "float64"}
    name = onnx.TensorProto.DataType.Name(kind.elem_type)
    return GraphTensor(port.name, names.get(name, name.lower()), sizes)
