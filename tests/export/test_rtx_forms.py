"""The forms that TensorRT for RTX fuses best: the same function, checked on ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.export.graph import constant, producer
from qdeploy.export.passes.clamped_norms import ClampedNorms
from qdeploy.export.passes.folded_scores import FoldedScores
from qdeploy.export.passes.several_blocks import SeveralBlocks
from tests.export.graphs import fires, graph, keeps_away, operators, random_inputs, run

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (8, 8)).astype(np.int8)
SCALES = np.geomspace(1e-3, 1e-2, 8).astype(np.float32)
BIAS = RANDOM.standard_normal(8).astype(np.float32)


def attention(biased: bool = True, output: str = "y", scales: str = "scales") -> ir.Model:
    """Scores of attention with two heads over four tokens, queries from a quantized layer."""
    add, read = ("b = Add (p, bias)", "b") if biased else ("", "p")
    text = f"""
    g (float[2,4,8] x, float[2,2,4,4] keys, float[8] other) => (float[2,2,4,4] y, float[2,2,4,4] {output}2)
    <float step = {{0.05}}, int8 z = {{0}}, int64[4] heads = {{2, 4, 2, 4}}, float root = {{0.7}}> {{
        q = QuantizeLinear (x, step, z)
        d = DequantizeLinear (q, step, z)
        w = DequantizeLinear <axis = 1> (codes, {scales})
        p = MatMul (d, w)
        {add}
        h = Reshape ({read}, heads)
        t = Transpose <perm = [0, 2, 1, 3]> (h)
        s = Mul (t, root)
        k = Mul (keys, root)
        scores = MatMul (s, k)
        y = Softmax (scores)
        {output}2 = Neg ({"t" if output == "t" else "scores"})
    }}"""
    constants = {"codes": CODES} | ({"scales": SCALES} if scales == "scales" else {})
    constants |= {"bias": BIAS} if biased else {}
    return graph(text, {"p": (2, 4, 8), "t": (2, 2, 4, 4), "keys": (2, 2, 4, 4)}, **constants)


@pytest.mark.parametrize("biased", [True, False])
def test_the_factor_of_the_scores_goes_into_the_weight_scales_and_the_bias(biased: bool) -> None:
    model = attention(biased)
    inputs = random_inputs(model)
    before = run(model, inputs)
    assert FoldedScores()(model).modified
    scores = next(node for node in model.graph if node.outputs[0].name == "scores")
    assert [producer(value).op_type for value in scores.inputs if producer(value)] == ["Transpose"]
    for first, second in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-6)
    assert not FoldedScores()(model).modified
    weight = next(node for node in model.graph if node.outputs[0].name == "w")
    np.testing.assert_allclose(constant(weight.inputs[1]), SCALES * np.float32(0.49), rtol=1e-6)


def test_queries_that_something_else_reads_keep_their_factor() -> None:
    keeps_away(FoldedScores(), attention(output="t"))


def test_scales_that_are_computed_keep_the_factor_where_it_is() -> None:
    keeps_away(FoldedScores(), attention(scales="other"))


def normed(
    between: str = "n", zero: str = "int8 z = {0}", reads_twice: bool = False, step: float = 0.05
) -> ir.Model:
    """A group norm, perhaps a transposition, and a quantizer."""
    moved = "m = Transpose <perm = [0, 2, 3, 1]> (n)" if between == "m" else "m = Neg (n)"
    text = f"""
    g (float[2,8,6,6] x) => (float[A,B,C,D] y, float[E,F,G,H] z2) <float step = {{{step}}}, {zero}> {{
        n = GroupNormalization <num_groups = 4, epsilon = 1e-5> (x, weight, bias)
        {moved}
        q = QuantizeLinear ({between}, step, z)
        y = DequantizeLinear (q, step, z)
        z2 = {"Neg (m)" if reads_twice else "Neg (y)"}
    }}"""
    return graph(text, {"n": (2, 8, 6, 6)}, weight=3 * np.abs(BIAS), bias=BIAS)


@pytest.mark.parametrize("step", [0.2, 0.01])  # with the second, much of the input lies outside of the codes
def test_a_norm_is_rounded_behind_an_activation_function_to_the_same_codes(step: float) -> None:
    model = normed("m", step=step)
    inputs = random_inputs(model)
    before = run(model, inputs)[0]
    assert ClampedNorms()(model).modified
    assert operators(model)[:3] == ["GroupNormalization", "Relu", "Sub"]
    after = run(model, inputs)[0]
    assert (before == -128 * np.float32(step)).any() == (step == 0.01)
    # A tie may fall to the other side: float32 rounds the sum.
    assert np.abs(after - before).max() <= step * 1.001
    assert (after != before).mean() < 1e-3
    assert not ClampedNorms()(model).modified


def test_norms_with_other_readers_and_other_codes_are_left_alone() -> None:
    keeps_away(ClampedNorms(), normed("n"))  # read by the Neg too
    keeps_away(ClampedNorms(), normed("m", reads_twice=True))
    keeps_away(ClampedNorms(), normed("m", zero="uint8 z = {128}"))


BY_COLUMN = "DequantizeLinear <axis = 1> (codes, scales)"
ONE_BLOCK = "DequantizeLinear <axis = 0, block_size = 64> (codes, scales)"


def linear(inputs: int = 64, weight: str = BY_COLUMN, x: str = "x", blocks: int = 0) -> ir.Model:
    """A linear layer of eight outputs with int4 weights."""
    text = f"""
    g (float[3,{inputs}] x) => (float[3,8] y) <float step = {{0.05}}, int8 z = {{0}}> {{
        q = QuantizeLinear (x, step, z)
        d = DequantizeLinear (q, step, z)
        w = {weight}
        p = MatMul ({x}, w)
        y = Neg (p)
    }}"""
    codes = RANDOM.integers(-8, 8, (inputs, 8)).astype(ml_dtypes.int4)
    scales = np.tile(SCALES, (blocks, 1)) if blocks else SCALES
    return graph(text, {"w": (inputs, 8)}, codes=codes, scales=scales)


@pytest.mark.parametrize(
    ("inputs", "weight", "block"),
    [(64, BY_COLUMN, 32), (256, BY_COLUMN, 128), (96, BY_COLUMN, 32), (64, ONE_BLOCK, 32)],
)
def test_int4_scales_of_a_column_become_those_of_blocks(inputs: int, weight: str, block: int) -> None:
    model = linear(inputs, weight, blocks=weight == ONE_BLOCK)
    fires(SeveralBlocks(), model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    read = producer(product.inputs[1])
    assert read.attributes.get_int("block_size") == block
    assert constant(read.inputs[1]).shape == (inputs // block, 8)


@pytest.mark.parametrize(
    "model",
    [
        linear(24),  # does not divide into blocks
        linear(128, ONE_BLOCK, blocks=2),  # has several
        linear(x="d"),  # multiplies codes
        linear(8, "DequantizeLinear <axis = 0> (codes, scales)"),  # scales of the inputs
    ],
    ids=["too few inputs", "several blocks", "quantized inputs", "scales of the inputs"],
)
def test_other_int4_weights_stay(model: ir.Model) -> None:
    keeps_away(SeveralBlocks(), model)
