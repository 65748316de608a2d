"""The parameters of single Q and DQ nodes: zero points, scales, axes, types."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qdeploy.export.graph.network import FLOATS, Network
from qdeploy.export.graph.nodes import stored
from qdeploy.export.graph.quantizer import (
    FP4,
    FP8,
    INT4,
    INT8,
    SIXTEEN_BIT,
    Quantizer,
    readable,
)
from qdeploy.export.lint.rule import E, Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope

_SMALLEST_NORMAL = {ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}


@rule("TRT001", E, "zero points are constant and all zero", "TensorRT quantizes symmetrically", "HDR, IMP")
def nonzero_zero_point(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.zero_point is None:
            continue
        root = net.root(q.zero_point)  # a Constant, or a Constant that is cast
        zeros = readable(root)
        if root is None:
            yield Hit(q.node, "the zero point is computed: make it an initializer of zeros")
        elif zeros is not None and (found := zeros.astype("float64")[zeros.astype("float64") != 0]).size:
            yield Hit(q.node, f"zero point {found[0]:g}: calibrate symmetrically, with zero point 0")


@rule(
    "TRT002",
    E,
    "quantized types are INT8, FLOAT8E4M3FN, INT4 or FLOAT4E2M1",
    "no other type has a kernel; UINT8 is for DLA only",
    "IMP",
)
def foreign_code_type(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.codes not in (None, INT8, INT4, FP8, FP4) and not _is_bias(q):
            yield Hit(q.node, f"{q.codes.name} codes: quantize to INT8, symmetrically")


def _is_bias(q: Quantizer) -> bool:
    return q.codes == ir.DataType.INT32  # see TRT019


@rule(
    "TRT003",
    W,
    "a Q names its type by a zero point",
    "without one the standard means uint8 and TensorRT int8: ONNX Runtime shows other numbers",
    "IMP",
)
def missing_zero_point(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.quantizes and q.zero_point is None and q.node.op_type == "QuantizeLinear":
            named = "output_dtype" in q.node.attributes
            meant = "older importers do not read output_dtype" if named else "uint8 by the standard"
            yield Hit(q.node, f"no zero point ({meant}): add one of type int8")


@rule(
    "TRT004",
    E,
    "constant scales are finite, positive and no 16-bit subnormals",
    "the importer asserts that scales are > 0; a dead channel makes 0",
    "IMP",
)
def impossible_scale(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        scales = readable(q.scale)
        if scales is None:
            continue
        values = scales.astype("float64")
        floor = _SMALLEST_NORMAL.get(net.dtype(q.scale), 0.0)  # type: ignore[arg-type]
        if scope.engine == "tensorrt-rtx":  # it reads subnormals
            floor = 0.0
        bad = values[~((values > 0) & (values < float("inf")) & (values >= floor))]
        if bad.size:
            yield Hit(q.node, f"scale {bad.flat[0]:g}: use a small normal number, as 1e-4, for dead channels")


@rule(
    "TRT005",
    E,
    "scales are initializers",
    "10.x documents them as constants of the build; computed ones block fusion",
    "HDR",
    since="rejected before 11, slow from 11",
)
def computed_scale(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        own = q.node.op_type.startswith("TRT_") or q.codes == FP4  # whose scales are codes of a level above
        if q.scale is not None and not stored(q.scale) and not own:
            severity = W if scope.engine == "tensorrt" and scope.tensorrt >= (11, 0) else E
            yield Hit(q.node, "the scale is computed by the graph: store it as an initializer", severity)


@rule("TRT006", E, "a 1-D scale is as long as its axis", "the importer checks it", "IMP")
def scale_length(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        shape, scales = net.shape(q.data), readable(q.scale)
        if shape is None or scales is None or scales.ndim != 1 or scales.size == 1 or q.blocked:
            continue
        if q.axis >= len(shape) or shape[q.axis] != scales.size:
            what = f"{scales.size} scales along axis {q.axis} of shape {shape}"
            yield Hit(q.node, f"{what}: set the axis that they belong to (the default is 1)")


@rule("TRT007", E, "only weights have a scale per channel", "activations are per tensor", "HDR")
def activation_per_channel(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.per_channel and net.root(q.data) is None and q.codes in (INT8, FP8):
            yield Hit(q.node, "an activation with one scale per channel: calibrate it per tensor")


@rule("TRT009", E, "zero points are as many as scales, of the codes' type", "the importer checks it", "IMP")
def zero_point_shape(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        zeros, scales = readable(q.zero_point), readable(q.scale)
        if zeros is None or scales is None:
            continue
        if zeros.size != scales.size:
            yield Hit(q.node, f"{zeros.size} zero points for {scales.size} scales: give one to each")
        data = net.dtype(q.data)
        if not q.quantizes and data not in (None, *FLOATS) and net.dtype(q.zero_point) != data:
            yield Hit(q.node, "the zero point has another type than the codes: use theirs")


@rule(
    "TRT010",
    E,
    "a 16-bit scale has the type of what the Q reads",
    "networks are strongly typed: nothing is converted",
    "HDR",
)
def scale_type(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        scale, data = net.dtype(q.scale), net.dtype(q.data)
        if q.quantizes and scale in SIXTEEN_BIT and data in FLOATS and scale != data:
            yield Hit(q.node, f"{_name(scale)} scale for a {_name(data)} input: store it as {_name(data)}")


@rule("TRT017", E, "no `precision` attribute", "an error on a DQ, ignored on a Q", "IMP", since="opset 23")
def precision_attribute(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if "precision" in q.node.attributes and not (q.quantizes and scope.engine == "tensorrt-rtx"):
            yield Hit(q.node, "drop the attribute `precision`", W if q.quantizes else E)


@rule(
    "TRT041",
    W,
    "a 16-bit scale is within 0.1 % of the calibrated one",
    "coarse scales drift from what was calibrated",
    "INF",
)
def coarse_scale(net: Network, scope: Scope) -> Hits:
    import numpy as np

    for q in net.quantizers:
        kind, stored = net.dtype(q.scale), readable(q.scale)
        if kind not in SIXTEEN_BIT:
            continue
        exact = readable(net.root(q.scale)) if stored is None else stored
        if exact is None:
            continue
        exact = exact.astype(np.float64)
        error = _step(exact, kind) if stored is not None else abs(_round(exact, kind) / exact - 1)
        # What a stored number was rounded from is unknown: it may have been off by half a step.
        if (error > 1e-3).any() or not np.isfinite(error).all():
            yield Hit(q.node, f"{_name(kind)} cannot hold the scale {exact.flat[0]:g} to 0.1 %: use FLOAT")


def _step(values: Any, kind: ir.DataType) -> Any:
    """Relative error up to which a stored number may have been rounded; exact powers of two count as such."""
    import numpy as np

    bits, lowest = (10, -14) if kind == ir.DataType.FLOAT16 else (7, -126)
    mantissa, exponent = np.frexp(np.abs(values))
    spacing = 2.0 ** (np.maximum(exponent - 1, lowest) - bits)
    return np.where(mantissa == 0.5, 0.0, spacing / 2 / np.abs(values))


def _round(values: Any, kind: ir.DataType) -> Any:
    return values.astype(kind.numpy()).astype("float64")


def _name(kind: ir.DataType | None) -> str:
    return "unknown" if kind is None else kind.name
