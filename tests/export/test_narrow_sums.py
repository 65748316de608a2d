"""Weights whose int8 products could overflow sums of 16 bits: found, and made floats without a difference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.export.passes.narrow_sums import LARGEST_PAIR, NarrowSums, overflowing
from tests.export.graphs import fires, graph, keeps_away, operators

GRAPH = """
agraph (float[1,4,6,6] x) => (float[1,2,6,6] y)
<float s = {0.05}, int8 z = {0}, int8[2,4,1,1] w = {CODES}, SCALES> {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    f = DequantizeLinear <axis = 0, block_size = 0> (w, t)
    y = Conv (INPUT, f)
}
"""


def convolution(*codes: int, scales: str = "float[2] t = {0.1, 0.3}", x: str = "d") -> ir.Model:
    """A convolution of 1 x 1 with four weights in each of two output channels."""
    text = GRAPH.replace("CODES", ", ".join(map(str, codes))).replace("SCALES", scales)
    return graph(text.replace("INPUT", x))


@pytest.mark.parametrize(
    ("codes", "overflows"),
    [
        ((64, 64, 0, 0, 0, 0, 0, 0), False),
        ((127, 1, 0, 0, 0, 0, 0, 0), False),
        ((65, 0, 0, 64, 0, 0, 0, 0), True),
        ((127, 0, 0, 0, 127, 0, 0, 0), False),  # of two output channels: never in one sum
        ((127, -127, 0, 0, 0, 0, 0, 0), False),  # they cancel
        ((-64, -64, 0, 0, 0, 0, 0, 0), False),
        ((0, 0, 0, 0, -65, 1, 1, -64), True),
    ],
)
def test_two_codes_of_one_sign_in_one_sum_decide(codes: tuple[int, ...], overflows: bool) -> None:
    model = convolution(*codes)
    if overflows:
        assert [layer.op_type for _, layer in overflowing(model)] == ["Conv"]
        fires(NarrowSums(), model)
        assert operators(model).count("DequantizeLinear") == 1  # that of the activations
    else:
        keeps_away(NarrowSums(), model)


def test_the_bound_is_that_of_the_instruction() -> None:
    """vpmaddubsw: two products of an unsigned and a signed byte, added in 16 bits."""
    limits = np.iinfo(np.int16)
    assert limits.max >= 255 * LARGEST_PAIR
    assert limits.max < 255 * (LARGEST_PAIR + 1)
    assert limits.min <= -255 * LARGEST_PAIR


def test_one_scale_for_all_weights_makes_them_one_sum() -> None:
    """No axis tells the output channels then."""
    codes = (65, 0, 0, 0, 64, 0, 0, 0)
    keeps_away(NarrowSums(), convolution(*codes))
    fires(NarrowSums(), convolution(*codes, scales="float t = {0.1}"))


def test_layers_with_float_activations_are_left() -> None:
    keeps_away(NarrowSums(), convolution(*[127] * 8, x="x"))
