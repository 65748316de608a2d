"""Small questions to an ONNX graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, if any does."""
    return value.producer() if value is not None else None


def constant(value: ir.Value | None) -> Any:
    """A constant's values as a numpy array; None if the value is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
