"""Positions of Q and DQ: what fuses into a kernel, and what becomes a separate kernel."""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.graph.network import Network
from qdeploy.export.graph.nodes import MOVES, WEIGHTED, stored, upstream
from qdeploy.export.graph.quantizer import FP8, INT8, Quantizer
from qdeploy.export.lint.rule import Hit, Hits, W, rule
from qdeploy.export.lint.scope import Scope

NORMS = (
    "GroupNormalization",
    "LayerNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "RMSNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
)
ACTIVATIONS = ("Sigmoid", "Swish", "HardSwish", "Gelu", "Erf", "Tanh", "Mish", "Silu")
# What a fused kernel computes on the way: they do not stop a region of integers from going on.
POINTWISE = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Mul", "Gelu", "Swish", "Tanh")
# Where a low-bit tensor is of use: the engine computes on codes, or passes them on.
USES = (
    *WEIGHTED,
    *("Add", "Sub", "Concat", "Split", "Slice", "Gather", "Pad", "Resize"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Softmax", "Attention", "TRT_QuantizedAttention"),
)
_PAIR = ("QuantizeLinear", "DequantizeLinear")


@rule(
    "TRT022",
    W,
    "a layer has both inputs quantized, or none",
    "half-quantized layers compute in floats and pay for the DQ",
    "DOC, ISS",
)
def half_quantized(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        x, w = layer.sources
        if (x is None) == (w is None) or any(
            layer.between[side] and not layer.sources[side] for side in (0, 1)
        ):
            continue
        if w is not None and w.codes not in (INT8, FP8):
            continue  # weight-only int4 is a scheme of its own
        have, lack = ("weight", "input") if x is None else ("input", "weight")
        yield Hit(layer.node, f"the {have} is quantized and the {lack} is not: quantize both or none")


@rule(
    "TRT023",
    W,
    "between a DQ and its layer stands nothing but Transpose and Reshape",
    "anything else, Cast above all, keeps the DQ from fusing",
    "MO",
)
def between(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        for side in (0, 1):
            if others := [step for step in layer.between[side] if step.op_type not in MOVES]:
                names = ", ".join(step.op_type for step in others)
                yield Hit(others[0], f"{names} between DQ and {layer.node.name}: move it before the Q")


@rule(
    "TRT028",
    W,
    "of a residual Add, the skipped branch is quantized and the layer's is not",
    "only then the Add fuses into the layer's kernel and stays in integers",
    "MO, DOC",
)
def residual(net: Network, scope: Scope) -> Hits:
    low_bit = {id(layer.node) for layer in net.layers if layer.low_bit}
    for node in net.nodes:
        if node.op_type != "Add" or any(stored(x) or x is None for x in node.inputs):
            continue
        quantized = [(q := net.quantizer(upstream(x, MOVES))) and not q.quantizes for x in node.inputs]
        layers = [upstream(x, (*MOVES, *_PAIR)) for x in node.inputs]
        of_layers = [layer is not None and layer.op_type in WEIGHTED for layer in layers]
        wrong = [q for q, of_layer in zip(quantized, of_layers) if q and of_layer]
        if len(wrong) > (1 if all(of_layers) else 0):
            yield Hit(node, "the layer's branch is quantized: quantize the skipped branch only")
        into_integers = any(
            (q := net.quantizer(user)) and q.quantizes
            for user, _ in net.users(node.outputs[0], (*MOVES, *POINTWISE))
        )
        if into_integers and not any(quantized) and any(id(layer) in low_bit for layer in layers):
            yield Hit(node, "between two quantized layers, the skipped branch is float: quantize it")


@rule(
    "TRT029",
    W,
    "the inputs of a Concat before a Q share its scale",
    "the Q moves above the Concat: every branch is rescaled by a kernel of its own",
    "MO",
)
def concat_scales(net: Network, scope: Scope) -> Hits:
    for node in net.nodes:
        if node.op_type != "Concat":
            continue
        after = [
            q for user, _ in net.users(node.outputs[0], MOVES) if (q := net.quantizer(user)) and q.quantizes
        ]
        inputs = [net.dequantizer(x)[0] for x in node.inputs]
        if any(q is not None and not q.same_grid(other) for other in after for q in inputs):
            yield Hit(
                node, "its inputs have other scales than the Q behind it: share one, or split the layer"
            )


@rule(
    "TRT030",
    W,
    "a tensor is quantized with one scale",
    "several Q are several kernels, and layers that could be one product (q, k, v) are not",
    "INF",
)
def several_scales(net: Network, scope: Scope) -> Hits:
    readers: dict[str, list[Quantizer]] = {}
    for q in net.quantizers:
        if q.quantizes and not stored(q.data):
            readers.setdefault(q.data.name or "", []).append(q)
    for value, several in readers.items():
        if any(not q.same_grid(several[0]) for q in several[1:]):
            yield Hit(
                several[0].data, f"{len(several)} Q with different scales read {value}: calibrate one scale"
            )


@rule(
    "TRT031",
    W,
    "normalizations and activations read floats",
    "they compute in floats: Q and DQ before them are overhead",
    "DOC",
)
def before_norm(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        readers = [] if q.quantizes else [node.op_type for node, _ in net.users(q.output, MOVES)]
        # SiLU is x * sigmoid(x): a Mul counts together with its Sigmoid.
        if all(op in (*NORMS, *ACTIVATIONS, "Mul") for op in readers) and {*readers} - {"Mul"}:
            yield Hit(q.node, f"feeds {readers[0]} only: take Q and DQ away")


@rule(
    "TRT032",
    W,
    "a DQ has a low-bit use, and codes are not rescaled to the scale they have",
    "otherwise both are kernels for nothing",
    "DOC",
)
def useless_pair(net: Network, scope: Scope) -> Hits:
    for q in net.quantizers:
        if q.quantizes:
            before = net.quantizer(q.data.producer())
            if before is not None and not before.quantizes and q.same_grid(before):
                yield Hit(q.node, "quantizes what a DQ of the same scale gave: read its codes")
            continue
        readers = list(net.users(q.output, MOVES))
        known = (*USES, *NORMS, *ACTIVATIONS)
        if q.codes in (INT8, FP8) and not any(_low_bit_use(net, node, known) for node, _ in readers):
            yield Hit(q.node, "nothing behind it computes in low bits: take Q and DQ away")


def _low_bit_use(net: Network, node: ir.Node, known: tuple[str, ...]) -> bool:
    # A layer behind a Cast or an arithmetic step is TRT023's; a normalization TRT031's.
    if node.op_type in known or net.quantizer(node):
        return True
    return node.op_type in ("Cast", "Mul", "Div") and any(
        user.op_type in WEIGHTED for user, _ in net.users(node.outputs[0], MOVES)
    )


@rule(
    "TRT045",
    W,
    "a network has int8 or fp8, not both",
    "unproven together",
    "INF",
)
def mixed_types(net: Network, scope: Scope) -> Hits:
    kinds = {q.codes for q in net.quantizers if q.quantizes or net.root(q.data) is None}
    if {INT8, FP8} <= kinds:
        yield Hit("graph", "INT8 and FP8 activations in one network: choose one")
