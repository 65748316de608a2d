"""Group normalization in the words of older opsets, for tools that cannot follow the operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant
from qdeploy.export.graph.writer import Writer


class SpelledOutNorms(InPlacePass):
    """``GroupNormalization(x)`` becomes Reshape, InstanceNormalization, Reshape, Mul, Add.

    So torch's exporter writes it below opset 21. ONNX infers neither type nor shape of the operator of opset 21, nor
    therefore of anything behind it.

    1. The node is a GroupNormalization of a tensor of known rank and channels, with constant gamma and beta.
    2. Then the node is replaced.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupNormalization":
                _replace(model, node)
                modified = True
        return PassResult(model, modified)


def _replace(model: ir.Model, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    rows, channels, *space = x.shape
    groups = node.attributes["num_groups"].as_int()
    write = Writer(model, node)
    ones, zeros = (write.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    by_group = write.constant(np.array([0, groups, -1], np.int64))
    by_channel = write.constant(np.array([0, channels, *space], np.int64))
    gamma, beta = (
        write.constant(constant(value).reshape(-1, *[1] * len(space))) for value in node.inputs[1:3]
    )
    apart = write.node("Reshape", x, by_group, shape=(rows, groups, None))
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    normal = write.node(
        "InstanceNormalization", apart, ones, zeros, shape=(rows, groups, None), epsilon=epsilon
    )
    whole = write.node("Reshape", normal, by_channel, shape=list(x.shape))
    scaled = write.node("Mul", whole, gamma, shape=list(x.shape))
    write.replace(node.outputs[0], write.node("Add", scaled, beta, shape=list(x.shape)))
