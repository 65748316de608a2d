"""Types and shapes of every value of a graph, inferred from the shapes of its inputs without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qdeploy.export.graph.nodes import FLOAT4, INTEGER_PRODUCT, WEIGHTED
from qdeploy.system.errors import InvalidInputError

Shape = tuple[int, ...]
Known = dict[str, tuple[ir.DataType | None, Shape | None]]

_SMALL = 1024  # bytes up to which a constant may be a shape that others are derived from
# Operators that keep the shape, for which onnx (1.23) has no shape inference of its own, or none at all.
_SAME_SHAPE = (
    "GroupNormalization",
    *(f"TRT_{kind}{way}Linear" for kind in ("FP8", "INT4") for way in ("Quantize", "Dequantize")),
)


def batch_of_one(model: ir.Model) -> dict[str, list[int | None]]:
    """Shapes of the inputs with 1 for their dynamic first axes and for all axes of the same name; None is unknown."""
    shapes = {value.name or "": list(value.shape) for value in model.graph.inputs if value.shape is not None}
    batches = {str(sizes[0]) for sizes in shapes.values() if sizes and not isinstance(sizes[0], int)}

    def size_of(axis: int, size: int | ir.SymbolicDim) -> int | None:
        if isinstance(size, int):
            return size
        return 1 if axis == 0 or (size.value is not None and str(size) in batches) else None

    return {name: [size_of(axis, size) for axis, size in enumerate(sizes)] for name, sizes in shapes.items()}


def infer(model: ir.Model, shapes: Mapping[str, Sequence[int | None]], strict: bool = False) -> Known:
    """Type and shape of each value by name; None for what is not known.

    Args:
        model: a graph without functions; it is left as it is.
        shapes: shapes of inputs; None for an axis of unknown size.
        strict: whether every contradiction is an error; otherwise some pass unnoticed.

    Raises:
        InvalidInputError: shapes contradict each other.
    """
    computed = _sizes_are_free(model)
    known = _infer(model, shapes, strict, computed)
    products = [node.outputs[0].name for node in model.graph if node.op_type in (*WEIGHTED, INTEGER_PRODUCT)]
    if not computed and any(known.get(name or "", (None, None))[1] is None for name in products):
        known = _infer(model, shapes, strict, compute_sizes=True) | {
            name: found for name, found in known.items() if found[1] is not None
        }
    return known


def _infer(
    model: ir.Model, shapes: Mapping[str, Sequence[int | None]], strict: bool, compute_sizes: bool
) -> Known:
    """`infer`, with or without computing sizes first, which takes longer and finds more."""
    import onnx.shape_inference

    light = model.clone()
    _leave_out_large_constants(light)
    _make_inferable(light)
    for value in light.graph.inputs:
        if (sizes := shapes.get(value.name or "")) is not None:
            value.shape = ir.Shape(sizes)
    # What the exporter wrote down holds for the symbolic batch, and would win over what is inferred.
    for node in light.graph:
        for value in node.outputs:
            value.shape = None
            if not value.is_graph_output():
                value.type = None
    if compute_sizes:
        _compute_sizes(light)
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(light), strict_mode=strict, data_prop=True)
    except Exception as error:
        raise InvalidInputError(
            f"the shapes in {model.graph.name!r} contradict each other: {error}"
        ) from error
    known: Known = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = info.type.tensor_type
        dims = kind.shape.dim
        fixed = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        shape = tuple(dim.dim_value for dim in dims) if fixed else None
        known[info.name] = (ir.DataType(kind.elem_type) if kind.elem_type else None, shape)
    return known


def _sizes_are_free(model: ir.Model) -> bool:
    """Whether other axes of inputs than the first have no fixed size."""
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
    return any(not isinstance(size, int) for shape in shapes for size in list(shape)[1:])


def _compute_sizes(light: ir.Model) -> None:
    """Replace what computes the sizes of tensors from the sizes of inputs by its result.

    Onnx infers shapes through a part of the integer arithmetic alone that graphs of free sizes have.
    """
    from onnxscript.optimizer import fold_constants

    fold_constants(light, onnx_shape_inference=True)


def _leave_out_large_constants(light: ir.Model) -> None:
    """Turn large initializers into inputs, so that gigabytes are not copied to infer shapes."""
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL:
            del light.graph.initializers[name]
            value.const_value, value.shape, value.dtype = None, ir.Shape(tensor.shape.numpy()), tensor.dtype
            if value not in light.graph.inputs:
                light.graph.inputs.append(value)


def _make_inferable(light: ir.Model) -> None:
    """Replace operators that onnx cannot infer by ones of the same shapes.

    MatMulIntegerToFloat becomes MatMulInteger and a Cast. What TRT_FP4DynamicQuantize rounds is not rounded.
    """
    for node in list(light.graph):
        if node.op_type in _SAME_SHAPE:
            node.op_type, node.domain = "Identity", ""
            node.resize_inputs(1)
            node.attributes.clear()
        elif node.op_type == FLOAT4:
            for user, _ in list(node.outputs[0].uses()):
                user.op_type = "Identity"
                user.resize_inputs(1)
                user.replace_input_with(0, node.inputs[0])
                user.attributes.clear()
        elif node.op_type == INTEGER_PRODUCT:
            sums = ir.node("MatMulInteger", node.inputs[:2])
            sums.outputs[0].name = f"{node.outputs[0].name}/sums"
            light.graph.insert_before(node, sums)
            node.op_type, node.domain = "Cast", ""
            node.resize_inputs(1)
            node.replace_input_with(0, sums.outputs[0])
            node.attributes.clear()
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT))
