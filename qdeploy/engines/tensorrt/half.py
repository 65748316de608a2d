"""Convert a float32 graph to 16 bits: a strongly typed network computes in the types that the graph states.

What depends on the timestep alone stays in float32: 999 times a frequency has an error of 0.25 in half
precision, and the sine of that is noise. Everything else is converted. A scale's type is the type of
DequantizeLinear's output, so that scales are converted too, unless they may stay wide: since opset 23 the output has
a type of its own. Inputs and outputs keep their types; casts convert at the borders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qdeploy.export.graph.network import Network
from qdeploy.export.graph.nodes import add_initializer, producer
from qdeploy.export.graph.quantizer import FP8, INT8, read_quantizer
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

TIME = "timestep"
FULL = ir.DataType.FLOAT
_HALVES = {"f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# The opset in which DequantizeLinear names the type of its output, and the file format that has it.
_OUTPUT_TYPES, _IR_OF_OUTPUT_TYPES = 23, 11
# Inputs that ONNX types as float32 whatever the others are: Resize's scales.
_FIXED = {"Resize": (2,), "Upsample": (1,)}
# A scale this far off would show in the result: quantization to 8 bits is about 1 % of the range.
_TOLERANCE = 0.01


def halve(source: Path, target: Path, precision: str, wide_scales: bool = False) -> None:
    """Write a graph in ``f16`` or ``bf16``.

    Args:
        source: a float32 graph.
        target: the new file; its weights are written next to it, to ``NAME_data``.
        precision: the type of everything that does not depend on the timestep alone.
        wide_scales: keep the scales of convolutions in float32, where both operands have one scale; the graph then is
            of opset 23.

    Raises:
        InvalidInputError: a weight is too large for half precision, or the file is no ONNX graph.
    """
    model = Network(source).model
    Halver(model, precision, wide_scales).run()
    ir.save(model, target, external_data=f"{target.name}_data")


class Halver:
    """Converts a model in place.

    Args:
        model: in float32, with the types of all values.
        precision: ``f16`` or ``bf16``.
        wide_scales: see `halve`.
    """

    def __init__(self, model: ir.Model, precision: str, wide_scales: bool = False) -> None:
        self.model, self.graph, self.precision = model, model.graph, precision
        self.half = _HALVES[precision]
        self.timed = time_only(model.graph)
        self.scales = {node.inputs[1] for node in model.graph if node.op_type in _QUANTIZERS}
        self.wide = _wide(model.graph) - self.timed if wide_scales else set()
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.coarse = 0

    def run(self) -> None:
        """Convert all nodes, constants and borders."""
        for node in list(self.graph):
            wanted = FULL if node in self.timed else self.half
            fixed = _FIXED.get(node.op_type, ())
            for place, value in enumerate(node.inputs):
                if value is not None:
                    needed = FULL if place in fixed or (place == 1 and node in self.wide) else wanted
                    node.replace_input_with(place, self._in_type(value, needed, node))
            if wanted == self.half:
                self._convert_attributes(node)
                if node in self.wide and node.op_type == "DequantizeLinear":
                    node.attributes.add(ir.AttrInt64("output_dtype", self.half))
                self._keep_output_types(node)
        if self.wide:
            imported = self.model.opset_imports
            imported[""] = max(imported[""], _OUTPUT_TYPES)
            self.model.ir_version = max(self.model.ir_version, _IR_OF_OUTPUT_TYPES)
        # Types and shapes that the exporter wrote hold no longer; TensorRT infers its own.
        for node in self.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.type = value.shape = None
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        if self.coarse:
            say(
                f"warning: {self.coarse} scales are more than {_TOLERANCE:.0%} off in {self.precision}, "
                "the engine may differ from what was calibrated"
            )

    def _in_type(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """A float value in the wanted type: itself, a converted constant or the output of a Cast."""
        producer = value.producer()
        has = self.half if producer is not None and producer not in self.timed else FULL
        if value.dtype != FULL or has == wanted:
            return value
        if (value, wanted) not in self.converted:
            if value.const_value is not None and producer is None:
                name = f"{value.name}/{self.precision}"
                array = self._half_array(value.const_value.numpy(), str(value.name), value in self.scales)
                self.converted[value, wanted] = add_initializer(self.model, name, array)
            else:
                name = f"{value.name}/to_{'f32' if wanted == FULL else self.precision}"
                cast = _cast(value, name, wanted)
                self.graph.insert_before(reader, cast)
                self.converted[value, wanted] = cast.outputs[0]
        return self.converted[value, wanted]

    def _keep_output_types(self, node: ir.Node) -> None:
        """Cast outputs of the graph back to float32 under their names."""
        for value in node.outputs:
            if value.is_graph_output() and value.dtype == FULL and value.name:
                cast = _cast(value, value.name, FULL)
                cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, FULL
                value.name = f"{value.name}/{self.precision}"
                self.graph.insert_after(node, cast)
                self.graph.outputs[self.graph.outputs.index(value)] = cast.outputs[0]
                self.converted[value, FULL] = cast.outputs[0]

    def _convert_attributes(self, node: ir.Node) -> None:
        """Convert attributes that state a type or hold numbers."""
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype", "output_dtype") and attribute.as_int() == FULL:
                node.attributes.add(ir.AttrInt64(name, self.half))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FULL:
                array = self._half_array(attribute.as_tensor().numpy(), node.name or node.op_type, False)
                node.attributes.add(ir.AttrTensor(name, ir.tensor(array)))

    def _half_array(self, value: Any, name: str, scale: bool) -> Any:
        if self.precision == "bf16":
            return value.astype(ml_dtypes.bfloat16)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        over = np.isinf(half) & np.isfinite(value)
        if over.any():
            # The lowest float masks attention; the lowest half does the same.
            if not (np.abs(value[over]) == np.finfo(np.float32).max).all():
                raise InvalidInputError(f"{name!r} has numbers beyond 65504: build with --precision bf16")
            half = np.where(over, np.copysign(np.float16(65504), value), half).astype(np.float16)
        if scale:
            # A scale of 0 is refused; the smallest half represents a channel of (almost) only zeros.
            half = np.where((half == 0) & (value > 0), np.float16(6e-8), half)
            self.coarse += int((np.abs(half - value) > _TOLERANCE * np.abs(value)).sum())
        return half


def _wide(graph: ir.Graph) -> set[ir.Node]:
    """The Q and DQ of int8 or fp8 convolutions whose two operands have one constant scale each.

    Products of matrices are not among them: with a float32 scale for each channel, TensorRT for RTX lets them write
    float32, and scales of two types at the two operands of one are refused.
    """
    convolutions = {node for node in graph if node.op_type == "Conv"}
    while True:
        found = {node for node in graph if node.op_type == "DequantizeLinear" and _one_scale(node)}
        found = {node for node in found if _readers(node) <= convolutions}
        kept = {
            conv for conv in convolutions if all(each.producer() in found for each in conv.inputs[:2] if each)
        }
        if kept == convolutions:
            break
        convolutions = kept
    quantizers = {node for node in graph if node.op_type == "QuantizeLinear" and _one_scale(node)}
    quantizers = {node for node in quantizers if _readers(node) <= found}
    computed = {
        node for node in found if (source := node.inputs[0]) is not None and source.producer() is not None
    }
    return quantizers | {
        node for node in found if node not in computed or producer(node.inputs[0]) in quantizers
    }


def _readers(node: ir.Node) -> set[ir.Node]:
    return {use.node for use in node.outputs[0].uses()}


def _one_scale(node: ir.Node) -> bool:
    quantizer = read_quantizer(node)
    scale = None if quantizer is None else quantizer.scale
    return (
        quantizer is not None
        and quantizer.codes in (INT8, FP8)
        and scale is not None
        and scale.const_value is not None
        and scale.const_value.size == 1
        and not quantizer.block_size
    )


def _cast(value: ir.Value, name: str, kind: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}/cast")
    cast.outputs[0].name = name
    return cast


def time_only(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that depend on the timestep and constants alone, and the constants of those."""
    known = {value: {value.name == TIME} for value in graph.inputs}
    kinds: dict[ir.Node, set[bool]] = {}
    for node in graph:
        # The batch size, by which the timestep is expanded, is not a value of the sample.
        sources = () if node.op_type in ("Shape", "Size") else node.inputs
        kinds[node] = set().union(*(known.get(value, set()) for value in sources if value is not None))
        known |= dict.fromkeys(node.outputs, kinds[node])
    timed = {node for node, kind in kinds.items() if kind == {True}}
    for node in reversed(graph):
        readers = {use.node for value in node.outputs for use in value.uses()}
        if not kinds[node] and readers and readers <= timed:
            timed.add(node)
    return timed
