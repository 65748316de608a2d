"""A convolution of a doubled image as a transposed convolution of the image itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer
from qdeploy.export.graph.writer import Writer

# Which of a kernel's three taps read the pixel that the transposed kernel's tap (row) adds to the output.
_TAPS = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)


class UpsampledConvolutions(InPlacePass):
    """``Conv3x3(Resize(x, 2))`` becomes a ConvTranspose of 4 x 4 with stride 2, in four ninths of the products.

    Doubled to the nearest pixel, neighbours are equal: the three taps of a row or column read two different
    pixels, and the weights of those that read the same one can be added beforehand. With ``w`` of the convolution,
    in one dimension::

        transposed = (w[2], w[1] + w[2], w[0] + w[1], w[0])

    Sums are taken in float64 and rounded to float32 once.

    1. The Conv has one group, a constant float32 weight of 3 x 3, stride and dilation 1, and one pixel of padding
       on each side.
    2. Its input is a Resize to the nearest pixel, rounded down, by a constant factor of 2 in height and width.
    3. Then the Conv is replaced; a Resize with other users stays for them.

    It does not fire behind quantizers: added codes need more bits than the codes have.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            weight = _weight(node)
            enlarged = producer(node.inputs[0]) if weight is not None else None
            if weight is None or enlarged is None or not _doubles(enlarged):
                continue
            _replace(model, node, enlarged, weight)
            modified = True
        return PassResult(model, modified)


def _weight(node: ir.Node) -> np.ndarray | None:
    """The weight [out, in, 3, 3] of a convolution that can be replaced."""
    if node.op_type != "Conv" or node.domain or node.attributes.get_int("group", 1) != 1:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.shape[2:] != (3, 3):
        return None
    ints = node.attributes.get_ints
    plain = {*ints("strides", [1]), *ints("dilations", [1])} == {1}
    padded = list(ints("pads", [0])) == [1] * 4
    given = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return weight if plain and padded and given else None


def _doubles(node: ir.Node) -> bool:
    """Whether a node repeats each pixel of [rows, channels, height, width] twice in both directions."""
    text = node.attributes.get_string
    if node.op_type != "Resize" or len(node.inputs) != 3 or text("mode", "nearest") != "nearest":
        return False
    if text("coordinate_transformation_mode", "half_pixel") != "asymmetric":
        return False
    factors = constant(node.inputs[2])
    floor = text("nearest_mode", "round_prefer_floor") == "floor"
    return floor and factors is not None and factors.tolist() == [1, 1, 2, 2]


def _replace(model: ir.Model, node: ir.Node, enlarged: ir.Node, weight: np.ndarray) -> None:
    write = Writer(model, node)
    summed = np.einsum("qk,oikl,rl->ioqr", _TAPS, weight.astype(np.float64), _TAPS).astype(np.float32)
    result = write.node(
        "ConvTranspose",
        enlarged.inputs[0],
        write.constant(summed, f"{node.name}.weight"),
        *node.inputs[2:],
        shape=node.outputs[0].shape,
        kernel_shape=[4, 4],
        pads=[1] * 4,
        strides=[2, 2],
    )
    name, made = node.name, result.producer()
    write.replace(node.outputs[0], result)
    assert made is not None
    made.name = name  # the layer's, for those who look for it
