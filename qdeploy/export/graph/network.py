"""A whole graph: shapes, types, quantizers and weighted layers, for one choice of its inputs' shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import onnx_ir as ir

from qdeploy.export.graph.file import read
from qdeploy.export.graph.nodes import FLOAT4, INTEGER_PRODUCT, MOVES, WEIGHTED, stored
from qdeploy.export.graph.quantizer import DataType, Quantizer, read_quantizer
from qdeploy.export.graph.shapes import Known, batch_of_one, infer
from qdeploy.system.errors import InvalidInputError

FLOATS = (DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16, DataType.DOUBLE)


@dataclass(frozen=True)
class WeightedNode:
    """A Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: the node.
        sources: for the input and the weight, the DQ it comes from through moves only, or None.
        between: the nodes between each DQ, however far away, and the layer; empty where there is none.
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
        shapes: shapes of its inputs; without one, axes named like an input's first count as 1.

    Attributes:
        model: the graph; types that could be inferred are written into it.
        contradiction: what is wrong with the shapes, if something is.

    Raises:
        InvalidInputError: the file is no ONNX graph.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        self.path, self.model = path, read(path)
        self.contradiction: str | None = None
        self._known: Known = {}
        try:
            self._known = infer(self.model, {**batch_of_one(self.model), **(shapes or {})})
        except InvalidInputError as error:
            self.contradiction = str(error)
        self._write_types()

    def _write_types(self) -> None:
        """Write the inferred types into the graph; those of TensorRT's operators follow from their names."""
        for node in self.model.graph:
            for value in node.outputs:
                kind = self.dtype(value)
                if node.op_type == FLOAT4:
                    kind = DataType.FLOAT8E4M3FN if value is node.outputs[1] else DataType.FLOAT4E2M1
                    self._known[value.name or ""] = (kind, None)
                elif node.op_type.startswith("TRT_") and (q := self.quantizer(node)):
                    kind = q.codes if q.quantizes else self.dtype(q.scale)
                    self._known[value.name or ""] = (kind, self.shape(value))
                if kind is not None:
                    value.dtype = kind

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """A value's shape, if it can be inferred."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        return self._known.get(value.name or "", (None, None))[1]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """A value's type, if it is known."""
        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.dtype
        inferred = self._known.get(value.name or "", (None, None))[0]
        return inferred if inferred is not None else value.dtype

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
        """All Q and DQ, without the DQ of scales."""
        found = [found for node in self.nodes if (found := self.quantizer(node))]
        scales = {each.scale for each in found}
        return [each for each in found if each.quantizes or each.output not in scales]

    def root(self, value: ir.Value | None) -> ir.Value | None:
        """The initializer that a value is made from, through Q, DQ, Cast and moves; else None."""
        while value is not None and not stored(value):
            node = value.producer()
            if node is None or not (node.op_type in (*MOVES, "Cast") or self.quantizer(node)):
                return None
            value = node.inputs[0]
        return value

    def dequantizer(self, value: ir.Value | None) -> tuple[Quantizer | None, tuple[ir.Node, ...]]:
        """The DQ that a value comes from, and the nodes between: moves, Cast and arithmetic with a constant."""
        between: list[ir.Node] = []
        while value is not None and (node := value.producer()) is not None:
            if found := self.quantizer(node):
                return (None if found.quantizes else found), tuple(between)
            computed = [x for x in node.inputs if x is not None and not stored(x)]
            if node.op_type == "Concat":
                return self._joined(node), tuple(between)
            if len(computed) != 1 or node.op_type not in (*MOVES, "Cast", "Mul", "Div", "Slice", "Pad"):
                break
            between.append(node)
            value = computed[0]
        return None, ()

    def _joined(self, concat: ir.Node) -> Quantizer | None:
        """The first DQ before a Concat, if all have one scale: TensorRT then moves it behind the Concat."""
        found = [self.dequantizer(value) for value in concat.inputs]
        first = found[0][0]
        if first is None or any(step.op_type not in MOVES for _, steps in found for step in steps):
            return None
        return first if all(q is not None and q.same_grid(first) for q, _ in found) else None

    @cached_property
    def layers(self) -> list[WeightedNode]:
        """All weighted layers and products of activations."""
        return [self._layer(node) for node in self.nodes if node.op_type in WEIGHTED and node.domain == ""]

    def _layer(self, node: ir.Node) -> WeightedNode:
        sources, between = zip(*(self.dequantizer(value) for value in node.inputs[:2]))
        straight = [
            source if all(step.op_type in MOVES for step in steps) else None
            for source, steps in zip(sources, between)
        ]
        return WeightedNode(node, tuple(straight), between, self.root(node.inputs[1]), self._macs(node))  # type: ignore[arg-type]

    def _macs(self, node: ir.Node) -> int | None:
        x, w, y = (self.shape(value) for value in (*node.inputs[:2], node.outputs[0]))
        if x is None or w is None or y is None:
            return None
        if node.op_type == "Conv":
            return prod(y) * prod(w[1:])
        if node.op_type == "ConvTranspose":
            return prod(x) * prod(w[1:])
        return prod(y) * (x[0] if node.attributes.get_int("transA", 0) else x[-1])

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of every product by the name of its node, attention and integer products included.

        Raises:
            InvalidInputError: the size of a node cannot be inferred, or the inputs' shapes contradict each other.
        """
        if self.contradiction is not None:
            raise InvalidInputError(self.contradiction)
        counts: dict[str, int] = {}
        for node in self.nodes:
            if node.op_type in (*WEIGHTED, INTEGER_PRODUCT, "MatMulInteger"):
                if (count := self._macs(node)) is None:
                    unknown = next(x for x in (*node.inputs[:2], *node.outputs) if self.shape(x) is None)
                    raise InvalidInputError(
                        f"the size of {node.name} in {self.path.name} is unknown: "
                        f"{unknown.name if unknown else 'an input'} has no shape"
                    )
                counts[node.name or ""] = count
        return counts

    def users(self, value: ir.Value, through: tuple[str, ...] = ()) -> Iterator[tuple[ir.Node, int]]:
        """The nodes that read a value and at which input, looking through some operators."""
        for node, position in value.uses():
            if node.op_type in through:
                yield from self.users(node.outputs[0], through)
            else:
                yield node, position
