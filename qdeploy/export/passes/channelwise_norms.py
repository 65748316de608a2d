"""Group normalization as a scale and a shift of each channel, which keep any memory layout."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant
from qdeploy.export.graph.writer import Writer

_INT64 = ir.DataType.INT64
OPSET = 21  # from here on, gamma and beta are per channel


class ChannelwiseNorms(InPlacePass):
    """``GroupNormalization(x)`` becomes ``x * scale[n, c] + shift[n, c]``.

    A kernel for a whole group reads its channels side by side in memory. Convolutions keep channels last, so
    that engines reorder the tensor before such a kernel, and again after it. Sums over one channel and a
    scale and a shift of one channel are computed in the layout that is there, and the latter within the
    kernel of the activation and the quantization that follow.

    (Wu and He 2018, equations 1 to 3)::

        mean = mean over channels of mean(x)        var = E[x^2] - mean^2
        scale = gamma / sqrt(var + epsilon)         shift = beta - mean * scale

    ``E[x^2]`` is the square of the L2 norm of the channels' L2 norms, by their number: one pass over x, without a
    tensor of squares.

    In float32 the variance is off by about ``2^-23 * E[x^2]``: where the mean is a hundred times the deviation,
    by a thousandth.

    1. The node is a GroupNormalization of opset 21, with one gamma and beta for each channel, in float32.
    2. The number of channels and of axes is known; gamma and beta are constants.
    3. Then the node is replaced. Sizes that only a call knows are counted then.

    It does not fire where the output is an output of the graph.
    """

    norms = True

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        if model.opset_imports.get("", 0) < OPSET:
            return PassResult(model, modified)
        for node in list(model.graph):
            sizes = _sizes(node)
            if sizes is not None:
                _replace(model, node, sizes, self.norms)
                modified = True
        return PassResult(model, modified)


class ChannelwiseNormsByMeans(ChannelwiseNorms):
    """`ChannelwiseNorms` with ``E[x^2]`` as the mean of squares.

    ONNX Runtime's CPU provider takes means two to four times as fast as L2 norms (1.31), more than the tensor of
    squares costs.
    """

    norms = False


def _sizes(node: ir.Node) -> list[int | ir.SymbolicDim] | None:
    """Channels, and the sizes of the axes behind them, whether they are known or not."""
    x = node.inputs[0]
    if node.op_type != "GroupNormalization" or node.outputs[0].is_graph_output():
        return None
    if x is None or x.shape is None or x.shape.rank() < 3:
        return None
    if x.dtype not in (None, ir.DataType.FLOAT) or any(constant(v) is None for v in node.inputs[1:3]):
        return None
    sizes = list(x.shape)[1:]
    return sizes if constant(node.inputs[1]).shape == (sizes[0],) else None


def _replace(model: ir.Model, node: ir.Node, sizes: list[int | ir.SymbolicDim], norms: bool) -> None:
    channels, *space = sizes
    assert isinstance(channels, int)
    known = [size for size in space if isinstance(size, int)]
    groups = node.attributes["num_groups"].as_int()
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    members = channels // groups
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    rows = x.shape[0]
    write = Writer(model, node)
    one, each, wide = (rows, groups, 1), (rows, groups, members), (rows, channels, *[1] * len(space))

    def op(kind: str, *inputs: ir.Value, shape: Sequence[Any] = one) -> ir.Value:
        return write.node(kind, *inputs, shape=shape)

    def number(value: float) -> ir.Value:
        return write.constant(np.array(value, np.float32))

    def integers(*values: int) -> ir.Value:
        return write.constant(np.array(values, np.int64))

    axes, members_axis = integers(*range(2, 2 + len(space))), integers(2)
    by_group, by_channel = integers(0, groups, members), integers(0, channels, *[1] * len(space))

    def over_group(reduction: str, values: ir.Value) -> ir.Value:
        channelwise = op(reduction, values, axes, shape=wide)
        return op(reduction, op("Reshape", channelwise, by_group, shape=each), members_axis)

    mean = over_group("ReduceMean", x)
    if norms:
        norm = over_group("ReduceL2", x)
        square = op("Mul", norm, norm)
        if len(known) == len(space):
            square = op("Mul", square, number(1 / (members * prod(known))))
        else:
            shape = write.node("Shape", x, shape=(len(space),), dtype=_INT64, start=2)
            pixels = write.node("ReduceProd", shape, shape=(), dtype=_INT64, keepdims=0)
            count = write.node("Cast", pixels, shape=(), to=ir.DataType.FLOAT)
            square = op("Div", square, op("Mul", count, number(members), shape=()))
    else:
        square = over_group("ReduceMean", op("Mul", x, x, shape=list(x.shape)))
    # rounding may leave a variance of nearly 0 below it
    variance = op("Relu", op("Sub", square, op("Mul", mean, mean)))
    deviation = op("Sqrt", op("Add", variance, number(epsilon)))
    gamma, beta = (write.constant(constant(value).reshape(groups, members)) for value in node.inputs[1:3])
    scale = op("Div", gamma, deviation, shape=each)
    shift = op("Sub", beta, op("Mul", mean, scale, shape=each), shape=each)
    scaled = op("Mul", x, op("Reshape", scale, by_channel, shape=wide), shape=list(x.shape))
    shifted = op("Add", scaled, op("Reshape", shift, by_channel, shape=wide), shape=list(x.shape))
    write.replace(node.outputs[0], shifted)
