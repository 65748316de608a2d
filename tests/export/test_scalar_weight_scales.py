"""One weight scale for each convolution: the same function, in a form that stays in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.export.graph import constant
from qdeploy.export.passes.scalar_weight_scales import ScalarWeightScales
from tests.export.test_passes import graph, keeps_away, random_inputs, run

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)
SCALES = np.geomspace(1e-4, 1e-2, 8).astype(np.float32)
BIAS = RANDOM.standard_normal(8).astype(np.float32)


def conv_graph(
    scales: np.ndarray = SCALES, step: float = 0.05, reads: str = "x", bias: str = "bias"
) -> ir.Model:
    text = f"""
    g (float[2,4,6,6] sample, float[8] other) => (float[2,8,6,6] y) <float step = {{{step}}}, int8 z = {{0}}> {{
        q = QuantizeLinear (sample, step, z)
        x = DequantizeLinear (q, step, z)
        w = DequantizeLinear <axis = 0> (codes, scales)
        c = Conv <pads = [1, 1, 1, 1]> ({reads}, w, {bias})
        y = Relu (c)
    }}"""
    constants = {"codes": CODES, "scales": scales} | ({"bias": BIAS} if bias == "bias" else {})
    return graph(text, {"c": (2, 8, 6, 6), "w": CODES.shape}, **constants)


def weight_scale(model: ir.Model) -> np.ndarray:
    conv = next(node for node in model.graph if node.op_type == "Conv")
    return constant(conv.inputs[1].producer().inputs[1])


def test_it_computes_the_same_with_one_scale_and_has_nothing_to_do_the_second_time() -> None:
    model = conv_graph()
    inputs = random_inputs(model)
    (before,) = run(model, inputs)
    assert ScalarWeightScales()(model).modified
    assert weight_scale(model).shape == ()
    (after,) = run(model, inputs)
    assert 10 * np.log10((before**2).mean() / ((before - after) ** 2).mean()) > 100
    assert not ScalarWeightScales()(model).modified


def test_the_scale_is_the_largest_where_there_is_room() -> None:
    model = conv_graph()
    ScalarWeightScales()(model)
    assert weight_scale(model) == SCALES.max()


@pytest.mark.parametrize("step", [20.0, 1e3, 1e6])
def test_no_result_leaves_half_precision_whatever_the_codes_of_the_input_are(step: float) -> None:
    worst = np.abs(CODES.astype(np.float64)).reshape(8, -1).sum(1).max() * 128 * step
    assert worst * SCALES.max() > 65504 / 2  # the largest scale would leave too little room
    model = conv_graph(step=step)
    ScalarWeightScales()(model)
    assert worst * float(weight_scale(model)) <= 65504 / 2 * (1 + 1e-6)


def test_it_keeps_away_from_equal_scales_unquantized_inputs_and_computed_biases() -> None:
    keeps_away(ScalarWeightScales(), conv_graph(np.full(8, 0.01, np.float32)))
    keeps_away(ScalarWeightScales(), conv_graph(reads="sample"))
    keeps_away(ScalarWeightScales(), conv_graph(bias="other"))
