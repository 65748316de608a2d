"""Types and shapes of every value of a graph, derived without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qdeploy.export.lint.scope import Shape
from qdeploy.export.macs import with_fixed_shapes

_SMALL = 1024  # bytes up to which a constant may be a shape that others are derived from


def skeleton(proto: Any) -> Any:
    """A model without its large constants, so that gigabytes are not copied to derive shapes."""
    import onnx

    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.graph.name = proto.graph.name
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() <= _SMALL:
            light.graph.initializer.add().CopyFrom(tensor)
            continue
        outside = light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        outside.data_location = onnx.TensorProto.EXTERNAL
    return light


def count_batch_as_one(light: Any) -> None:
    """Give the inputs' dynamic first axes, and all axes named like them, the size 1."""
    shapes = [port.type.tensor_type.shape.dim for port in light.graph.input]
    batches = {dims[0].dim_param for dims in shapes if dims and not dims[0].HasField("dim_value")} - {""}
    for dims in shapes:
        for position, dim in enumerate(dims):
            if not dim.HasField("dim_value") and (position == 0 or dim.dim_param in batches):
                dim.dim_value = 1


def derive(
    light: Any, shapes: Mapping[str, Shape], strict: bool = False
) -> dict[str, tuple[ir.DataType | None, Shape | None]]:
    """Type and shape of each value by name; None for what is not known.

    Args:
        light: a `skeleton`; it is left as it is.
        shapes: shapes of inputs.
        strict: whether every contradiction is an error.

    Raises:
        InvalidInputError: shapes contradict each other.
    """
    copy = type(light).FromString(light.SerializeToString())
    graph = with_fixed_shapes(copy, shapes, strict)
    types: dict[str, tuple[ir.DataType | None, Shape | None]] = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.tensor_type
        dims = kind.shape.dim
        known = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        shape = tuple(dim.dim_value for dim in dims) if known else None
        types[info.name] = (ir.DataType(kind.elem_type) if kind.elem_type else None, shape)
    return types
