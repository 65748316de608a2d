"""A float32 graph in 16 bits. A strongly typed network computes in the types that the graph says.

What depends on the timestep alone stays in float32: 999 times a frequency has an error of 0.25 in half
precision, and the sine of that is noise. The rest goes over, Q/DQ scales included, because the scale's type
is the type behind DequantizeLinear. Inputs and outputs keep their types; casts stand at the borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

TIME = "timestep"
# Inputs that ONNX types as float32 whatever the others are: Resize's scales.
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_FIXED = {"Resize": (2,), "Upsample": (1,)}
# A scale this far off would show in the result: quantization to 8 bits is about 1 % of the range.
_TOLERANCE = 0.01


def halve(source: Path, target: Path, precision: str) -> None:
    """Write a graph in ``f16`` or ``bf16``.

    Args:
        source: a float32 graph.
        target: where it goes, with its weights in ``NAME_data`` beside it.
        precision: the type of everything that does not depend on the timestep alone.

    Raises:
        InvalidInputError: a weight is too large for half precision.
    """
    import onnx

    model = onnx.load(source)
    hollow = onnx.load(source, load_external_data=False)  # inference takes no more than 2 GB
    Halver(model, precision, _types(hollow)).run()
    location = f"{target.name}_data"
    onnx.save(model, target, save_as_external_data=True, location=location)


class Halver:
    """One pass over a model, which it changes in place.

    Args:
        model: in float32, external weights loaded.
        precision: ``f16`` or ``bf16``.
        types: element types by the name of the tensor.
    """

    def __init__(self, model: Any, precision: str, types: dict[str, int]) -> None:
        import onnx

        self.onnx, self.graph, self.precision = onnx, model.graph, precision
        kinds = onnx.TensorProto
        self.full = kinds.FLOAT
        self.half = kinds.FLOAT16 if precision == "f16" else kinds.BFLOAT16
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = types
        self.scales = {node.input[1] for node in self.graph.node if node.op_type in _QUANTIZERS}
        self.casts: dict[tuple[str, int], str] = {}
        self.halved: dict[str, str] = {}
        self.renamed: dict[str, str] = {}  # outputs of the graph, to what they are cast from
        self.nodes: list[Any] = []
        self.coarse = 0

    def run(self) -> None:
        """Do it."""
        timed = time_only(self.graph)
        self.side = {name: self.full if index in timed else self.half
                     for index, node in enumerate(self.graph.node) for name in node.output}  # fmt: skip
        self.side |= {port.name: self.full for port in self.graph.input}
        outputs = {port.name for port in self.graph.output}
        for index, node in enumerate(self.graph.node):
            wanted = self.full if index in timed else self.half
            fixed = _FIXED.get(node.op_type, ())
            for place, name in enumerate(node.input):
                node.input[place] = self._as(name, self.full if place in fixed else wanted)
            if wanted == self.half:
                self._retype(node)
            self.nodes.append(node)
            for place, name in enumerate(node.output):
                if name in outputs and wanted == self.half and self.types.get(name) == self.full:
                    node.output[place] = self.renamed[name] = f"{name}/{self.precision}"
                    self.nodes.append(self._cast(node.output[place], name, self.full))
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.constants.values() if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        if self.coarse:
            say(
                f"warning: {self.coarse} scales are more than {_TOLERANCE:.0%} off in {self.precision}, "
                "the engine may differ from what was calibrated"
            )

    def _as(self, name: str, wanted: int) -> str:
        """The name under which a tensor has the wanted float type."""
        if name in self.constants:
            return self._constant(name, wanted)
        if name in self.renamed:
            return name if wanted == self.full else self.renamed[name]
        if self.types.get(name) != self.full or self.side.get(name, wanted) == wanted:
            return name
        key = (name, wanted)
        if key not in self.casts:
            self.casts[key] = f"{name}/to_{'f32' if wanted == self.full else self.precision}"
            self.nodes.append(self._cast(name, self.casts[key], wanted))
        return self.casts[key]

    def _cast(self, source: str, target: str, wanted: int) -> Any:
        return self.onnx.helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=wanted)

    def _constant(self, name: str, wanted: int) -> str:
        """An initializer in the wanted type; both versions are kept where both are read."""
        tensor = self.constants[name]
        if tensor.data_type != self.full or wanted == self.full:
            return name
        if name not in self.halved:
            self.halved[name] = f"{name}/{self.precision}"
            self.constants[self.halved[name]] = self._half_tensor(tensor, self.halved[name])
        return self.halved[name]

    def _retype(self, node: Any) -> None:
        """Attributes that fix a type or hold numbers."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == self.full:
                attribute.i = self.half
            if attribute.HasField("t") and attribute.t.data_type == self.full:
                attribute.t.CopyFrom(self._half_tensor(attribute.t, attribute.t.name))

    def _half_tensor(self, tensor: Any, name: str) -> Any:
        import numpy as np

        value = self.onnx.numpy_helper.to_array(tensor).astype(np.float32)
        if self.precision == "bf16":
            bits = value.view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return self.onnx.helper.make_tensor(name, self.half, tensor.dims, rounded.tobytes(), raw=True)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        over = np.isinf(half) & np.isfinite(value)
        if over.any():
            # The lowest float masks attention; the lowest half does the same.
            if not (np.abs(value[over]) == np.finfo(np.float32).max).all():
                raise InvalidInputError(
                    f"{tensor.name!r} has numbers beyond 65504: build with --precision bf16"
                )
            half = np.where(over, np.copysign(np.float16(65504), value), half).astype(np.float16)
        if tensor.name in self.scales:
            # A scale of 0 is refused; the smallest half stands for a channel of (almost) nothing but zeros.
            half = np.where((half == 0) & (value > 0), np.float16(6e-8), half)
            self.coarse += int((np.abs(half - value) > _TOLERANCE * np.abs(value)).sum())
        return self.onnx.numpy_helper.from_array(half, name)


def time_only(graph: Any) -> set[int]:
    """Indices of the nodes that depend on the timestep and constants alone, and of constants for those."""
    known = {port.name: {port.name == TIME} for port in graph.input}
    kinds: list[set[bool]] = []
    for node in graph.node:
        # The batch size, by which the timestep is expanded, is no number of the sample's.
        sources = () if node.op_type in ("Shape", "Size") else node.input
        kinds.append(set().union(*(known.get(name, set()) for name in sources)))
        known |= dict.fromkeys(node.output, kinds[-1])
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    timed = {index for index, kind in enumerate(kinds) if kind == {True}}
    for index in reversed(range(len(kinds))):
        after = [reader for name in graph.node[index].output for reader in readers.get(name, [])]
        if not kinds[index] and after and timed.issuperset(after):
            timed.add(index)
    return timed


def _types(model: Any) -> dict[str, int]:
    """Element types of all tensors that the file or onnx's inference can tell; the model is used up."""
    import onnx

    for node in model.graph.node:
        if node.op_type == "GroupNormalization":  # onnx (1.23) does not infer its output
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    return {info.name: info.type.tensor_type.elem_type for info in _with_types(infos)}


def _with_types(infos: Any) -> Iterator[Any]:
    return (info for info in infos if info.type.tensor_type.elem_type)
