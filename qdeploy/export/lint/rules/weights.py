"""How weights and biases are stored: axes, blocks, 4 bits, integers or floats."""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.graph.network import Network, WeightedNode
from qdeploy.export.graph.nodes import FLOAT4, MOVES, stored
from qdeploy.export.graph.quantizer import FOUR_BIT, FP8, INT4, INT8, Quantizer, readable, scale_rank
from qdeploy.export.lint.rule import E, Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope

INT4_BLOCKS = (64, 128)  # sizes with known kernels


@rule(
    "TRT008",
    W,
    "scales run along the consumer's output channels",
    "another axis does not fuse, and a missing one (default 1) is wrong for convolutions",
    "HDR, INF",
)
def channel_axis(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        q = layer.sources[1]
        rank = _rank(net, layer.node.inputs[1])
        if q is None or not q.per_channel or rank is None:
            continue
        wanted = _back(layer.between[1], _output_axis(layer.node, rank))
        if wanted is not None and q.axis != wanted:
            yield Hit(q.node, f"scales along axis {q.axis} of {_label(layer)}'s weight: use axis {wanted}")


def _output_axis(node: ir.Node, rank: int) -> int:
    """The axis of the weight that becomes the output's channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else rank - 1


def _back(steps: tuple[ir.Node, ...], axis: int) -> int | None:
    """The axis before transpositions; None where another move makes it unclear."""
    for step in steps:
        if step.op_type != "Transpose" or "perm" not in step.attributes:
            return None
        axis = int(step.attributes["perm"].as_ints()[axis])
    return axis


@rule(
    "TRT012",
    E,
    "block scales have the rank of the data and one blocked axis, the last or the one before it",
    "the importer takes no other block quantization",
    "IMP, HDR",
)
def block_shape(net: Network, scope: Scope) -> Hits:
    for q in _blocked(net):
        if q.node.op_type == FLOAT4:  # it makes its block scales itself
            continue
        shape, scales = net.shape(q.data), readable(q.scale)
        if q.codes == INT8:
            yield Hit(q.node, "int8 codes have no block scales: use one per output channel")
        if shape is None or scales is None:
            continue
        if scale_rank(q) != len(shape):
            yield Hit(
                q.node, f"scales of rank {scale_rank(q)} for data of rank {len(shape)}: use equal ranks"
            )
            continue
        axes = [axis for axis, (size, count) in enumerate(zip(shape, scales.shape)) if size != count]
        if len(axes) > 1 or (axes and axes[0] < len(shape) - 2):
            yield Hit(q.node, f"blocks along axes {axes}: block the last axis or the one before it, only")


@rule(
    "TRT013",
    E,
    "4-bit tensors have an even number of elements, and blocks divide their axis",
    "two codes share a byte; partial blocks are not read",
    "IMP, MO",
)
def whole_blocks(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        shape = net.shape(q.data)
        if shape is None:
            continue
        elements = 1
        for size in shape:
            elements *= size
        if q.codes in FOUR_BIT and elements % 2:
            yield Hit(q.node, f"{elements} codes of 4 bits: pad to an even number")
        if q.block_size and q.axis < len(shape) and shape[q.axis] % q.block_size:
            yield Hit(
                q.node, f"blocks of {q.block_size} do not divide {shape[q.axis]}: pad, or choose a divisor"
            )


@rule("TRT014", W, "int4 blocks hold 64 or 128 codes", "no other size has known kernels", "MO, INF")
def int4_block_size(net: Network, scope: Scope) -> Hits:
    for q in _blocked(net):
        if q.codes == INT4 and not q.quantizes and q.block_size not in INT4_BLOCKS:
            yield Hit(q.node, f"blocks of {q.block_size}: use 128")


@rule(
    "TRT015",
    E,
    "int4 is for constant weights of MatMul and Gemm, stored as codes",
    "int4 is a weight-only scheme of GEMMs; in convolutions it saves no time",
    "DOC",
)
def int4_place(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.codes not in (INT4, ir.DataType.UINT4):
            continue
        if q.quantizes or not stored(q.data):
            yield Hit(q.node, "int4 codes that are computed: store the weight's codes behind a DQ")
            continue
        for node, position in net.users(q.output, MOVES):
            if node.op_type.startswith("Conv"):
                refused = scope.engine == "tensorrt-rtx" and net.dequantizer(node.inputs[0])[0] is not None
                what = f"an int4 weight of a {node.op_type}: store the codes as int8"
                yield Hit(q.node, what, E if refused else W)
            elif node.op_type not in ("MatMul", "Gemm") or position != 1:
                yield Hit(
                    q.node, f"int4 codes read by {node.op_type}: only weights of MatMul and Gemm may be"
                )


@rule(
    "TRT047",
    E,
    "a weight in int4 blocks is multiplied by floats",
    "the scales of its blocks cannot be taken out of the sum of an int8 product, and fp8 has no such kernel",
    "RUN",
)
def int4_blocks_by_codes(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        x, weight = layer.sources
        if x is not None and weight is not None and weight.codes == INT4 and weight.block_size:
            what = "an int4 weight in blocks is multiplied by a quantized input"
            yield Hit(
                layer.node, f"{what}: leave the input in 16 bits, or give the weight one scale per channel"
            )


@rule(
    "TRT019",
    E,
    "biases are float initializers",
    "a DQ takes no int32 codes; a computed bias takes a slower importer path",
    "IMP",
)
def quantized_bias(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if bias is None or stored(bias):
            continue
        if net.root(bias) is not None:
            yield Hit(layer.node, "the bias comes through Q or DQ or a move: store its float values")
        elif layer.node.op_type != "Gemm":
            yield Hit(layer.node, "the bias is computed: add it with an Add", W)
    for q in net.quantizers:
        if q.codes == ir.DataType.INT32 and not any(p == 2 for _, p in net.users(q.output)):
            yield Hit(q.node, "int32 codes: store the float values")


@rule(
    "TRT033",
    W,
    "quantized weights are stored as codes",
    "a Q at build time rounds again, which loses learned rounding, and the file is four times larger",
    "DOC, INF",
)
def float_weight(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.quantizes and stored(q.data):
            yield Hit(q.node, "a float constant goes through Q: store its codes behind the DQ")


def _blocked(net: Network) -> list[Quantizer]:
    return [q for q in net.quantizers if q.blocked and q.codes in (INT4, INT8, FP8, *FOUR_BIT)]


def _rank(net: Network, value: ir.Value | None) -> int | None:
    shape = net.shape(value)
    return None if shape is None else len(shape)


def _label(layer: WeightedNode) -> str:
    return layer.node.name or layer.node.op_type
