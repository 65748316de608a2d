"""A graph as rules ask about it: shapes, types, constants, quantizers, weighted layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qdeploy.export.lint.quantizer import Quantizer, read_quantizer, readable
from qdeploy.export.lint.scope import Scope, Shape
from qdeploy.export.lint.shapes import count_batch_as_one, derive, skeleton
from qdeploy.export.macs import WEIGHTED, macs_of
from qdeploy.system.errors import InvalidInputError

# What TensorRT moves a Q upstream of, or a DQ downstream of, so that a quantized region grows.
COMMUTES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: the node.
        sources: for the input and the weight, the DQ it comes from through nothing but moves, or None.
        between: the nodes between each DQ, however far, and the layer; empty where there is none.
        weight: the initializer that the weight comes from; None for a product of two activations.
        macs: multiply-accumulates, if the shapes are known.
    """

    node: ir.Node
    sources: tuple[Quantizer | None, Quantizer | None]
    between: tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]
    weight: ir.Value | None
    macs: int | None

    @property
    def low_bit(self) -> ir.DataType | None:
        """The type that it multiplies in, if both inputs come straight from DQ: int8 or fp8.

        A 4-bit weight is dequantized first: the product is then of the activation's type.
        """
        if any(source is None for source in self.sources):
            return None
        types = {source.codes for source in self.sources if source is not None}
        return types.pop() if len(types) == 1 else None


class Network:
    """A graph with everything that can be known of it before a build.

    Args:
        path: an ONNX file.
        scope: its profile gives the shapes; without one, axes named like an input's first count as 1.

    Raises:
        InvalidInputError: the file is no ONNX graph.
    """

    def __init__(self, path: Path, scope: Scope) -> None:
        import onnx
        import onnx.inliner

        self.path, self.scope = path, scope
        try:
            proto = onnx.load(path, load_external_data=False)
            if proto.functions:
                proto = onnx.inliner.inline_local_functions(proto)
            self.model = ir.from_proto(proto)
            self.model.graph.sort()  # refuses cycles, in which every walk below would be lost
        except Exception as error:  # protobuf's and the reader's errors have no common base
            raise InvalidInputError(f"{path} is damaged or no ONNX graph") from error
        if not proto.ir_version or not len(self.model.graph):
            raise InvalidInputError(f"{path} is damaged or no ONNX graph: it holds no node")
        ir.external_data.set_base_dir(self.model.graph, path.parent)
        self.skeleton = skeleton(proto)
        self.contradiction: str | None = None
        self._types: dict[str, tuple[ir.DataType | None, Shape | None]] = {}
        optimal = {name: opt for name, (_, opt, _) in scope.profile.items()}
        light = skeleton(proto)
        count_batch_as_one(light)
        try:
            self._types = derive(light, optimal)
        except InvalidInputError as error:
            self.contradiction = str(error)
        self._write_types()

    def _write_types(self) -> None:
        """Give the graph's own values the types that were derived; TensorRT's operators tell theirs."""
        for node in self.model.graph:
            for value in node.outputs:
                kind = self.dtype(value)
                if node.op_type.startswith("TRT_") and (q := self.quantizer(node)):
                    kind = q.codes if q.quantizes else self.dtype(q.scale)
                    self._types[value.name or ""] = (kind, self.shape(value))
                if kind is not None:
                    value.dtype = kind

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """A value's shape at the optimal profile, if it can be derived."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        return self._types.get(value.name or "", (None, None))[1]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """A value's type, if it is known."""
        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.dtype
        inferred = self._types.get(value.name or "", (None, None))[0]
        return inferred if inferred is not None else value.dtype

    def constant(self, value: ir.Value | None) -> Any:
        """A constant's numbers; None if it is computed, or if its data is cut short."""
        return readable(value)

    @cached_property
    def nodes(self) -> list[ir.Node]:
        """All nodes of the main graph."""
        return list(self.model.graph)

    @cached_property
    def opset(self) -> int:
        """The version of the standard's operators."""
        return int(self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 0)))

    def quantizer(self, node: ir.Node | None) -> Quantizer | None:
        """The Q or DQ that a node is."""
        if node is None:
            return None
        shape = self.shape(node.inputs[0]) if node.inputs else None
        return read_quantizer(node, None if shape is None else len(shape))

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        """All Q and DQ."""
        return [found for node in self.nodes if (found := self.quantizer(node))]

    def stored(self, value: ir.Value | None) -> bool:
        """Whether a value is an initializer or a Constant."""
        return value is not None and ir.convenience.get_const_tensor(value) is not None

    def root(self, value: ir.Value | None) -> ir.Value | None:
        """The initializer that a value is made from, through Q, DQ, Cast and moves; else None."""
        while value is not None and not self.stored(value):
            node = value.producer()
            if node is None or not (node.op_type in (*COMMUTES, "Cast") or self.quantizer(node)):
                return None
            value = node.inputs[0]
        return value

    def dequantizer(self, value: ir.Value | None) -> tuple[Quantizer | None, tuple[ir.Node, ...]]:
        """The DQ above a value, and what stands between: moves, Cast and arithmetic with a constant."""
        between: list[ir.Node] = []
        while value is not None and (node := value.producer()) is not None:
            if found := self.quantizer(node):
                return (None if found.quantizes else found), tuple(between)
            computed = [x for x in node.inputs if x is not None and not self.stored(x)]
            if node.op_type == "Concat":
                return self._joined(node), tuple(between)
            if len(computed) != 1 or node.op_type not in (*COMMUTES, "Cast", "Mul", "Div", "Slice", "Pad"):
                break
            between.append(node)
            value = computed[0]
        return None, ()

    def _joined(self, concat: ir.Node) -> Quantizer | None:
        """The first DQ before a Concat, if all have one scale: TensorRT then moves it behind the Concat."""
        found = [self.dequantizer(value) for value in concat.inputs]
        first = found[0][0]
        if first is None or any(step.op_type not in COMMUTES for _, steps in found for step in steps):
            return None
        return first if all(q is not None and q.same_grid(first) for q, _ in found) else None

    @cached_property
    def layers(self) -> list[Layer]:
        """All weighted layers and products of activations."""
        return [self._layer(node) for node in self.nodes if node.op_type in WEIGHTED and node.domain == ""]

    def _layer(self, node: ir.Node) -> Layer:
        sources, between = zip(*(self.dequantizer(value) for value in node.inputs[:2]))
        straight = [
            source if all(step.op_type in COMMUTES for step in steps) else None
            for source, steps in zip(sources, between)
        ]
        return Layer(node, tuple(straight), between, self.root(node.inputs[1]), self._macs(node))  # type: ignore[arg-type]

    def _macs(self, node: ir.Node) -> int | None:
        shapes = [self.shape(value) for value in (*node.inputs[:2], node.outputs[0])]
        if any(shape is None for shape in shapes):
            return None
        return macs_of(ir.to_proto(node), *(shape for shape in shapes if shape is not None))

    def users(self, value: ir.Value, through: tuple[str, ...] = ()) -> Iterator[tuple[ir.Node, int]]:
        """The nodes that read a value and at which input, looking through some operators."""
        for node, position in value.uses():
            if node.op_type in through:
                yield from self.users(node.outputs[0], through)
            else:
                yield node, position

    def before(self, value: ir.Value | None, through: tuple[str, ...]) -> ir.Node | None:
        """The node that computes a value, looking through some operators."""
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in through:
            value = next((x for x in node.inputs if x is not None and not self.stored(x)), None)
            node = value.producer() if value is not None else None
        return node
