"""Operators and structure: what the importer does not read, and what should be folded first."""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.graph.external import is_elsewhere, locations
from qdeploy.export.graph.network import FLOATS, Network
from qdeploy.export.graph.nodes import stored
from qdeploy.export.graph.quantizer import DEQUANTIZE, QUANTIZE
from qdeploy.export.lint.rule import E, Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope

PROTOBUF_LIMIT = 2**31
ELSEWHERE = "TRT048"  # looked at before a graph is read
INTEGER_OPS = (
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)
TRT_OPS = (
    *(f"TRT_{kind}{way}Linear" for kind in ("FP8", "INT4") for way in ("Quantize", "Dequantize")),
    "TRT_MXFP8DequantizeLinear",
    "TRT_MXFP8DynamicQuantize",
    "TRT_FP4DynamicQuantize",
    "TRT_BlockQuantize",
    "TRT_BlockDequantize",
    "TRT_DynamicQuantize",
    "TRT_QuantizedAttention",
    "TRT_Attention",
    "TRT_MoE",
    "TRT_KVCacheUpdate",
)
CONTROL = ("If", "Loop", "Scan", "NonZero")
_KEPT = ("Constant", "ConstantOfShape", *QUANTIZE, *DEQUANTIZE)  # folding them changes what is meant


@rule("TRT018", E, "quantization is Q/DQ", "the importer has no QLinear, Integer or dynamic operators", "IMP")
def integer_operator(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if node.op_type in INTEGER_OPS or (node.domain and node.op_type.startswith("QLinear")):
            yield Hit(node, f"{node.op_type}: export in the QDQ format")


@rule("TRT020", E, "operators are standard, or TensorRT's own", "others are looked up as plugins", "IMP")
def unknown_operator(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if node.domain not in ("", "ai.onnx") and node.op_type not in TRT_OPS:
            yield Hit(node, f"{node.domain}::{node.op_type}: export with standard operators only")


@rule(
    "TRT036",
    E,
    "more than 2 GB are in external data files, and these are complete",
    "protobuf ends at 2 GB; a wrong size fails in the parser",
    "ISS",
)
def external_data(net: Network, scope: Scope) -> Hits:
    inside = 0
    for name, value in net.model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            inside += 0 if tensor is None else tensor.nbytes
            continue
        file = net.path.parent / tensor.location
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if file.stat().st_size < needed or (tensor.length or tensor.nbytes) < tensor.nbytes:
            yield Hit(
                name, f"{tensor.location} is shorter than the {needed} bytes it should have: copy it again"
            )
    if inside >= PROTOBUF_LIMIT:
        yield Hit("initializers", f"{inside / 2**30:.1f} GB in the graph file: save with external data")


@rule(
    ELSEWHERE,
    E,
    "external data lie in plain files of the graph's own folder",
    "a graph of others could have any file of yours read or written; qdeploy reads no further",
    "RUN",
)
def weights_elsewhere(net: Network, scope: Scope) -> Hits:
    for location in locations(net.path):
        if is_elsewhere(net.path, location):
            yield Hit(
                "initializers",
                f"weights lie in {location[:200]!r}: save your own with its weights in the same folder, use no other",
            )


@rule(
    "TRT037",
    E,
    "no sequences, and no control flow or sizes that depend on values",
    "sequences are not read; the others split the network and keep it from CUDA graphs",
    "IMP",
)
def control_flow(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if "Sequence" in node.op_type:
            yield Hit(node, f"{node.op_type}: use Concat or Split of tensors")
        elif node.op_type in CONTROL:
            yield Hit(node, f"{node.op_type}: export one static path", W)


@rule(
    "TRT038",
    W,
    "group normalization is one operator",
    "Reshape, InstanceNormalization, Reshape, Mul, Add may miss the fused kernel",
    "IMP",
)
def decomposed_group_norm(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if node.op_type != "InstanceNormalization" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].producer(), [user.op_type for user, _ in net.users(node.outputs[0])]
        if before is not None and before.op_type == "Reshape" and "Reshape" in after:
            yield Hit(node, "a group normalization in pieces: export with opset 21, as GroupNormalization")


@rule(
    "TRT039",
    W,
    "normalizations are one operator, whose epsilon its type can hold",
    "pieces do not fuse; in FP16 their squares overflow from 256 on, and an epsilon below 6e-8 is 0",
    "ISS, INF",
)
def fragile_norm(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if node.op_type == "ReduceMean" and _is_variance(node):
            yield Hit(node, "a normalization in pieces: export with LayerNormalization (opset 17)")
        epsilon = node.attributes.get_float("epsilon", 1.0)
        if epsilon < 6e-8 and net.dtype(node.inputs[0]) == ir.DataType.FLOAT16:
            yield Hit(node, f"epsilon {epsilon:g} is 0 in FP16: normalize in FLOAT, between two Casts")


def _is_variance(node: ir.Node) -> bool:
    """Whether a ReduceMean reads the square of something minus its mean."""
    square = node.inputs[0].producer() if node.inputs[0] is not None else None
    if square is None or not (
        square.op_type == "Pow" or (square.op_type == "Mul" and square.inputs[0] is square.inputs[1])
    ):
        return False
    centred = square.inputs[0].producer() if square.inputs[0] is not None else None
    mean = (
        centred.inputs[1].producer() if centred and centred.op_type == "Sub" and centred.inputs[1] else None
    )
    return mean is not None and mean.op_type == "ReduceMean"


@rule(
    "TRT044",
    W,
    "what is constant is folded",
    "Identity, chains of Cast and computed shapes make the importer's graph larger and hide patterns",
    "DOC",
)
def foldable(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if why := foldable_node(node):
            yield Hit(node, why)


def foldable_node(node: ir.Node) -> str | None:
    """What to do with a node that need not be there, if it need not."""
    if node.op_type in _KEPT or node.domain or not node.inputs:
        return None
    source, result = node.inputs[0], node.outputs[0]
    if node.op_type == "Identity":
        return None if result.is_graph_output() else "an Identity: remove it"
    if node.op_type == "Cast" and source is not None and redundant_cast(source, result.dtype):
        return None if result.is_graph_output() else "a Cast that changes nothing: remove it"
    if (
        node.op_type == "Shape"
        and source is not None
        and source.shape is not None
        and source.shape.is_static()
    ):
        return "the shape of a tensor of fixed shape: store it"
    if all(value is None or stored(value) for value in node.inputs):
        return f"{node.op_type} of constants: store its result"
    return None


def redundant_cast(source: ir.Value, kind: ir.DataType | None) -> bool:
    """Whether a Cast to a type gives what it reads, or undoes a Cast that lost nothing."""
    if kind is None or source.dtype == kind:
        return kind is not None
    before = source.producer()
    if (
        before is None
        or before.op_type != "Cast"
        or before.inputs[0] is None
        or before.inputs[0].dtype != kind
    ):
        return False
    wider = source.dtype
    return kind in FLOATS and wider in FLOATS and wider is not None and wider.bitwidth > kind.bitwidth
