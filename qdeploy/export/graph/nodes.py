"""Questions about single nodes and values of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

# Products with weights, or of two activations.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# ONNX Runtime's product of integers with a float result.
INTEGER_PRODUCT = "MatMulIntegerToFloat"
# TensorRT's rounding to float4 in blocks; its second output is their scales.
FLOAT4 = "TRT_FP4DynamicQuantize"
WEIGHTED_OPS = (*WEIGHTED, INTEGER_PRODUCT)
# Operators that pass on the numbers they read. TensorRT moves a Q upstream of them, and a DQ downstream.
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None for inputs and initializers."""
    return value.producer() if value is not None else None


def constant(value: ir.Value | None) -> Any:
    """A constant's values as a numpy array; None if the value is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def stored(value: ir.Value | None) -> bool:
    """Whether a value is an initializer or the output of a Constant."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def upstream(value: ir.Value | None, through: Iterable[str] = MOVES) -> ir.Node | None:
    """The node that computes a value, skipping operators of the types in ``through``.

    A skipped operator is followed to its first input that is not a constant.
    """
    node = producer(value)
    while node is not None and node.op_type in through:
        node = producer(next((x for x in node.inputs if x is not None and not stored(x)), None))
    return node


def beside_a_layer(value: ir.Value | None) -> bool:
    """Whether a constant is a rotation or a branch of a layer (`qdeploy.quant.basis`), and not its weight."""
    name = value.name if value is not None and value.name else ""
    return name.rpartition(".")[2] in ("rotation", "branch_down", "branch_up")


def block_size(node: ir.Node) -> int:
    """Elements that share a scale of a Q or DQ; 0 if it has no blocks."""
    return int(node.attributes.get_int("block_size", 0))


def label(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or node.outputs[0].name or ""


def store(model: ir.Model, name: str, array: Any) -> ir.Value:
    """A new initializer; a name that is taken gets a number."""
    taken, count, unique = model.graph.initializers, 0, name
    while unique in taken:
        count += 1
        unique = f"{name}.{count}"
    return add_initializer(model, unique, array)


def add_initializer(model: ir.Model, name: str, array: Any) -> ir.Value:
    """An initializer under a name that is free."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.initializers[name] = value
    return value
