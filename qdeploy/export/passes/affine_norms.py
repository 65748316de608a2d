"""Group normalisation as one factor and one shift per channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant
from qdeploy.export.writer import Writer


class AffineNorms(InPlacePass):
    """``GroupNormalization(x)`` becomes ``x * a + b`` with a and b per sample and channel.

    ONNX Runtime's CPU provider has no kernel for it, and expands it into six passes over the tensor. The
    statistics of a group follow from those of its channels: with m and q the means of x and x^2 over a
    channel's positions, a group has mean M = mean(m) and variance V = mean(q) - M^2, so
    a = gamma / sqrt(V + epsilon) and b = beta - M a. Everything but x^2, two means, a product and a sum is of
    the size of the channels.

    1. The number of channels is known, and gamma and beta are constants with one entry per channel.
    2. The input has at least one axis behind the channels.
    3. Then the nodes above take its place. In exact arithmetic the function is the same; in float32 the variance
       loses digits where a group's mean is large beside its deviation.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupNormalization" and node.domain == "":
                modified |= _rewrite(model, node)
        return PassResult(model, modified)


def _rewrite(model: ir.Model, node: ir.Node) -> bool:
    x, gamma, beta = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    if x is None or x.shape is None or gamma is None or beta is None or x.shape.rank() < 3:
        return False
    rows, channels, *positions = x.shape
    if not isinstance(channels, int) or gamma.shape != (channels,) or beta.shape != (channels,):
        return False
    groups = node.attributes["num_groups"].as_int()
    attribute = node.attributes.get("epsilon")
    epsilon = np.float32(1e-5 if attribute is None else attribute.as_float())
    members = channels // groups
    write = Writer(model, node)
    axes = write.constant(np.arange(2, 2 + len(positions), dtype=np.int64), "axes")
    per_channel = (rows, channels, *[1] * len(positions))
    cut = write.constant(np.array([0, groups, members]), "shape")
    whole = write.constant(np.array([0, channels, *[1] * len(positions)]), "shape")
    inside = write.constant(np.array([2]), "axes")

    def of_group(values: ir.Value) -> ir.Value:
        """The mean over positions and over the channels of a group, [rows, groups, 1]."""
        means = write.node("ReduceMean", values, axes, shape=per_channel, keepdims=1)
        cuts = write.node("Reshape", means, cut, shape=(rows, groups, members))
        return write.node("ReduceMean", cuts, inside, shape=(rows, groups, 1), keepdims=1)

    def small(operator: str, *inputs: ir.Value, size: int = 1) -> ir.Value:
        return write.node(operator, *inputs, shape=(rows, groups, size))

    mean = of_group(x)
    squares = of_group(write.node("Mul", x, x, shape=x.shape))
    variance = small("Sub", squares, small("Mul", mean, mean))
    deviation = small("Sqrt", small("Add", variance, write.constant(epsilon, "epsilon")))
    scale = write.constant(gamma.astype(np.float32).reshape(1, groups, members), "gamma")
    shift = write.constant(beta.astype(np.float32).reshape(1, groups, members), "beta")
    factor = small("Div", scale, deviation, size=members)
    offset = small("Sub", shift, small("Mul", mean, factor, size=members), size=members)
    scaled = write.node("Mul", x, write.node("Reshape", factor, whole, shape=per_channel), shape=x.shape)
    result = write.node("Add", scaled, write.node("Reshape", offset, whole, shape=per_channel), shape=x.shape)
    write.replace(node.outputs[0], result)
    return True
