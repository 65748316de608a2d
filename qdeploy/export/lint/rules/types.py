"""Types and versions: what has to be explicit in a strongly typed network."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from qdeploy.export.graph.network import FLOATS, Network
from qdeploy.export.graph.quantizer import FOUR_BIT, FP4, FP8, SIXTEEN_BIT
from qdeploy.export.lint.rule import E, Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope

DOUBLE = ir.DataType.DOUBLE
# From this TensorRT version on: the newest opset and the newest IR version of the parser's ONNX.
PARSERS = {(10, 0): (22, 10), (10, 14): (23, 11), (11, 0): (25, 13)}
AGREE = {
    "Add": slice(0, 2),
    "Sub": slice(0, 2),
    "Mul": slice(0, 2),
    "Div": slice(0, 2),
    "Pow": slice(0, 2),
    "MatMul": slice(0, 2),
    "Gemm": slice(0, 3),
    "Conv": slice(0, 3),
    "ConvTranspose": slice(0, 3),
    "Concat": slice(0, None),
    "Where": slice(1, 3),
}


def parser_limits(tensorrt: tuple[int, int]) -> tuple[int, int]:
    """Newest opset and IR version that a TensorRT version reads."""
    known = [version for version in PARSERS if version <= tensorrt]
    return PARSERS[max(known)] if known else PARSERS[min(PARSERS)]


def compute_type(net: Network) -> ir.DataType | None:
    """The float type of most weighted layers' outputs; 16 bits in case of a tie."""
    counts = Counter(kind for layer in net.layers if (kind := net.dtype(layer.node.outputs[0])) in FLOATS)
    return max(counts, key=lambda kind: (counts[kind], kind in SIXTEEN_BIT)) if counts else None


@rule(
    "TRT011",
    W,
    "a DQ gives out the type that the network computes in",
    "the scale's type decides the layer's: a FLOAT scale makes a layer of a 16-bit network FP32",
    "IMP",
)
def dequantized_type(net: Network, scope: Scope) -> Hits:
    wanted = compute_type(net)
    for q in net.quantizers:
        given = net.dtype(q.output)
        if not q.quantizes and wanted in SIXTEEN_BIT and given in FLOATS and given != wanted:
            yield Hit(
                q.node, f"gives {given.name} in a {wanted.name} network: store the scale as {wanted.name}"
            )


@rule(
    "TRT016",
    E,
    "the opset has what the graph uses, and the parser knows the opset",
    "int4 and blocks came with 21, fp8 and 16-bit scales with 19, fp4 with 23",
    "DOC, MO",
)
def opset(net: Network, scope: Scope) -> Hits:
    newest = parser_limits(scope.tensorrt)[0]
    if net.opset > newest:
        yield Hit("opset", f"opset {net.opset}: TensorRT {_dots(scope.tensorrt)} reads up to {newest}")
    for q in net.quantizers:
        if q.node.domain:
            continue
        needs = max(
            23 if q.codes == FP4 else 0,
            21 if q.codes in FOUR_BIT or q.block_size else 0,
            19 if q.codes == FP8 or net.dtype(q.scale) in SIXTEEN_BIT else 0,
        )
        if net.opset < needs:
            yield Hit(q.node, f"needs opset {needs}, the graph declares {net.opset}: export with {needs}")


@rule(
    "TRT021",
    E,
    "operands have one type, and none is DOUBLE",
    "networks are strongly typed: nothing is promoted",
    "DOC",
)
def operand_types(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        operands = node.inputs[AGREE[node.op_type]] if node.op_type in AGREE else ()
        kinds = {kind for value in operands if value is not None and (kind := net.dtype(value)) is not None}
        if len(kinds) > 1:
            names = " and ".join(sorted(kind.name for kind in kinds))
            yield Hit(node, f"operands of {names}: cast the smaller one, constants too")
        if any(net.dtype(value) == DOUBLE for value in (*node.inputs, *node.outputs)):
            yield Hit(node, "DOUBLE: compute in FLOAT")


@rule(
    "TRT034",
    W,
    "a quantized layer reads the graph's input, and writes its output, in the declared type",
    "a Cast next to them is one more pass over the tensor",
    "INF",
)
def io_types(net: Network, scope: Scope) -> Hits:
    quantized = {id(layer.node) for layer in net.layers if layer.low_bit}
    for node in net.nodes:
        if node.op_type != "Cast" or net.dtype(node.inputs[0]) not in FLOATS:
            continue
        if net.dtype(node.outputs[0]) not in FLOATS:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and source.is_graph_input():
            if any((q := net.quantizer(user)) and q.quantizes for user, _ in net.users(result)):
                yield Hit(node, f"casts the input {source.name} for a Q: declare the input in that type")
        elif result.is_graph_output() and source is not None and id(source.producer()) in quantized:
            yield Hit(node, f"casts a quantized layer's result: declare {result.name} in its type")


@rule("TRT046", W, "the parser's ONNX knows the IR version", "a newer one may not load", "INF")
def ir_version(net: Network, scope: Scope) -> Hits:
    newest, version = parser_limits(scope.tensorrt)[1], net.model.ir_version or 0
    if version > newest:
        yield Hit(
            "ir_version", f"IR version {version}: set {newest}, as TensorRT {_dots(scope.tensorrt)} knows"
        )


def _dots(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
