"""A forecast of an engine from the graph alone: low-bit shares, layers left in float, Q/DQ that do not fuse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qdeploy.export.graph.network import Network, WeightedNode
from qdeploy.export.graph.nodes import MOVES, upstream
from qdeploy.export.graph.quantizer import FP4, FP8, INT4, INT8, Quantizer

KINDS = {INT8: "int8", FP8: "fp8", INT4: "int4", FP4: "fp4"}
RATE = {
    "int8": 2.0,
    "fp8": 2.0,
    "fp4": 4.0,
}  # multiplications per second on tensor cores, relative to 16 bits
# A Q fuses into the kernel of what computes its input, if that kernel computes pointwise or multiplies.
_NO_KERNEL = ("Concat", "Split", "Slice", "Pad", "Gather")


@dataclass(frozen=True)
class Named:
    """A node, what it costs as a share of all multiplications, in which type, and why."""

    name: str
    why: str
    kind: str = ""
    share: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The multiplications of a graph.

    Attributes:
        total: multiply-accumulates at the optimal shapes; None if some layer's size is unknown.
        shares: of the multiplications, by type. ``int4`` is weight-only: its products are of floats.
        floats: the layers that stay float, largest first.
        kernels: Q and DQ that become kernels of their own.
        crossings: tensors that change between float and low bits.
        single: whether floats are computed in FP32.
    """

    total: int | None
    shares: dict[str, float]
    floats: tuple[Named, ...]
    kernels: tuple[Named, ...]
    crossings: int
    single: bool

    @property
    def bound(self) -> float:
        """How many times faster than all in 16 bits the multiplications alone could be."""
        return (
            1 / sum(share / RATE.get(kind, 1.0) for kind, share in self.shares.items())
            if self.shares
            else 1.0
        )

    def sentence(self) -> str:
        """For people."""
        if self.total is None:
            return "the sizes of some layers are unknown: set --shapes to count multiplications"
        parts = ", ".join(f"{share:.1%} {kind}" for kind, share in self.shares.items())
        text = f"{self.total / 1e6:.1f} M multiplications: {parts}; at best {self.bound:.2f}x of 16 bits"
        text += (
            f"; {self.crossings} crossings between floats and low bits, {len(self.kernels)} of them unfused"
        )
        if self.single:
            text += (
                "; floats are FP32: networks are strongly typed, so convert them to 16 bits before a build"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "total": self.total,
            "shares": {kind: round(share, 4) for kind, share in self.shares.items()},
            "bound": round(self.bound, 3),
            "float_layers": [
                {"node": layer.name, "kind": layer.kind, "share": round(layer.share, 4), "reason": layer.why}
                for layer in self.floats
            ],
            "own_kernels": [{"node": pair.name, "reason": pair.why} for pair in self.kernels],
            "crossings": self.crossings,
            "floats_are_fp32": self.single,
        }


def forecast(net: Network) -> Forecast:
    """Predict a build from the graph alone."""
    total = sum(layer.macs or 0 for layer in net.layers)
    known = all(layer.macs is not None for layer in net.layers) and total > 0
    counts: Counter[str] = Counter()
    floats = []
    for layer in net.layers:
        kind = _kind(net, layer)
        counts[kind] += layer.macs or 0
        if kind not in RATE:
            share = (layer.macs or 0) / total if known else 0.0
            floats.append(Named(layer.node.name or "", _why_float(net, layer), kind, share))
    floats.sort(key=lambda layer: -layer.share)
    kernels = tuple(Named(q.node.name or "", why) for q in net.quantizers if (why := _why_unfused(net, q)))
    activations = [q for q in net.quantizers if net.root(q.data) is None]
    return Forecast(
        total if known else None,
        {kind: count / total for kind, count in counts.most_common()} if known else {},
        tuple(floats),
        kernels,
        sum(q.quantizes for q in activations),
        any(_kind(net, layer) == "fp32" for layer in net.layers),
    )


def _kind(net: Network, layer: WeightedNode) -> str:
    if layer.low_bit in (INT8, FP8, FP4):
        return KINDS[layer.low_bit]
    if layer.sources[1] is not None and layer.sources[1].codes == INT4:
        return "int4"
    kind = net.dtype(layer.node.outputs[0])
    return {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}.get(kind, "fp32")  # type: ignore[arg-type]


def _why_float(net: Network, layer: WeightedNode) -> str:
    for side, what in ((0, "input"), (1, "weight")):
        if layer.between[side] and layer.sources[side] is None:
            names = ", ".join(dict.fromkeys(n.op_type for n in layer.between[side] if n.op_type not in MOVES))
            return f"{names} between the DQ and its {what}"
    x, w = layer.sources
    if x is not None and w is not None:
        return "its inputs have two types" if w.codes != INT4 else "int4 is a weight-only scheme"
    if w is not None:
        return "int4 is a weight-only scheme" if w.codes == INT4 else "its input is not quantized"
    if x is not None:
        return "its weight is not quantized"
    return "not quantized" if layer.weight is not None else "a product of two activations"


def _why_unfused(net: Network, q: Quantizer) -> str | None:
    """Why a Q or DQ of an activation is a kernel of its own, if it is."""
    if net.root(q.data) is not None:
        return None
    if not q.quantizes:
        readers = [node.op_type for node, _ in net.users(q.output, MOVES)]
        others = [
            op for op in readers if op not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "QuantizeLinear")
        ]
        return f"read in floats by {', '.join(sorted(set(others)))}" if others else None
    first = upstream(q.data, MOVES)
    if first is None:
        return "it quantizes an input of the graph"
    if first.op_type in _NO_KERNEL:
        return f"{first.op_type} computes nothing that it could fuse into"
    readers = [node.op_type for node, _ in net.users(q.data) if net.quantizer(node) is None]
    if readers:
        return f"its tensor is also read in floats by {', '.join(sorted(set(readers)))}"
    return None
