"""What OpenVINO's CPU engine gets wrong."""

from __future__ import annotations

from qdeploy.export.graph.network import Network
from qdeploy.export.graph.nodes import MOVES, upstream
from qdeploy.export.graph.quantizer import INT8
from qdeploy.export.lint.rule import E, Hit, Hits, rule
from qdeploy.export.lint.scope import Scope


@rule(
    "OV001",
    E,
    "no int8 Conv reads a Concat through Q/DQ",
    "its results are wrong by a third of their range, whether Q/DQ stand before the Concat or behind it",
    "RUN",
    since="OpenVINO 2026.4",
    verified=True,
)
def conv_after_concat(net: Network, scope: Scope) -> Hits:
    for layer in net.layers:
        weight = layer.sources[1]
        if layer.node.op_type != "Conv" or weight is None or weight.codes != INT8:
            continue
        behind = layer.sources[0] is not None
        steps = (*MOVES, "Relu", "QuantizeLinear", "DequantizeLinear")
        concat = upstream(layer.node.inputs[0], steps)
        if concat is None or concat.op_type != "Concat":
            continue
        before = [(q := net.quantizer(upstream(x, MOVES))) and not q.quantizes for x in concat.inputs]
        if behind or all(before):
            yield Hit(layer.node, "split it: one Conv for each part of the Concat, and an Add")
