"""Rewrites for engines that keep channels last: they fire, keep away where their rules say so, and compute the same
within the rounding of float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import InPlacePass

from qdeploy.export.lower import CHANNELS_LAST, adapt
from qdeploy.export.passes.channelwise_norms import ChannelwiseNorms, ChannelwiseNormsByMeans
from qdeploy.export.passes.pixels_as_tokens import PixelsAsTokens
from qdeploy.export.passes.scaled_scores import ScaledScores
from qdeploy.export.passes.transposed_keys import TransposedKeys
from tests.export.graphs import Arrays, graph, keeps_away, operators, random_inputs, run

RANDOM = np.random.default_rng(1)


def fires(rewrite: InPlacePass, model: ir.Model, inputs: Arrays | None = None, within: float = 2e-6) -> None:
    """The pass changes the graph, says so, keeps the result, and has nothing to do the second time."""
    inputs = inputs or random_inputs(model)
    before = run(model, inputs)
    assert rewrite(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for first, second in zip(before, run(model, inputs), strict=True):
        assert np.abs(first - second).max() <= within * np.abs(first).max()
    assert not rewrite(model).modified


# -- ChannelwiseNorms --------------------------------------------------------------------------------------


def norm_graph(shape: str = "2,8,5,3", groups: int = 4, head: int = 21, more: str = "") -> ir.Model:
    text = f"""
    agraph (float[{shape}] x) => (float[{shape}] y) {{
        n = GroupNormalization <num_groups = {groups}, epsilon = 0.001> (x, gamma, beta)
        y = Neg (n)
        {more}
    }}"""
    rank = [int(size) if size.isdigit() else size for size in shape.split(",")]
    channels = groups if head < 21 else 8
    gamma, beta = (RANDOM.normal(size=channels).astype(np.float32) for _ in range(2))
    model = graph(text, {"n": tuple(rank)}, gamma=gamma, beta=beta)
    model.graph.opset_imports[""] = head
    return model


FORMS = (ChannelwiseNorms, ChannelwiseNormsByMeans)


@pytest.mark.parametrize("shape", ["2,8,5,3", "1,8,7", "2,8,3,4,2", "3,8,2,1"])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_a_norm_becomes_a_scale_and_a_shift_of_channels(
    shape: str, groups: int, form: type[ChannelwiseNorms]
) -> None:
    model = norm_graph(shape, groups)
    fires(form(), model)
    assert "GroupNormalization" not in operators(model)
    full = tuple(int(size) for size in shape.split(","))
    touched = [node.op_type for node in model.graph if node.inputs[0].shape == ir.Shape(full)]
    # two reads for the statistics, one pass with scale and shift
    squares = ["ReduceL2"] if form.norms else ["Mul", "ReduceMean"]
    assert sorted(touched) == sorted(["Add", "Mul", "Neg", "ReduceMean", *squares])


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_a_hundred_times_the_deviation_costs_a_thousandth(form: type[ChannelwiseNorms]) -> None:
    model = norm_graph()
    x = (RANDOM.normal(size=(2, 8, 5, 3)) + 100).astype(np.float32)
    fires(form(), model, {"x": x}, within=1e-2)


def test_channels_of_very_different_means_and_deviations_normalise_alike() -> None:
    model = norm_graph()
    x = RANDOM.normal(size=(2, 8, 5, 3)) * 10.0 ** RANDOM.integers(-2, 3, size=(1, 8, 1, 1))
    x += RANDOM.normal(size=(2, 8, 1, 1)) * 3
    fires(ChannelwiseNorms(), model, {"x": x.astype(np.float32)}, within=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_image_stays_finite(form: type[ChannelwiseNorms]) -> None:
    model = norm_graph()
    (y,) = run(model, {"x": np.full((2, 8, 5, 3), 1e3, np.float32)})
    form()(model)
    (after,) = run(model, {"x": np.full((2, 8, 5, 3), 1e3, np.float32)})
    assert np.isfinite(y).all()
    assert np.isfinite(after).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(5, 3), (16, 16)])
def test_pixels_that_only_a_call_knows_are_counted_then(
    form: type[ChannelwiseNorms], size: tuple[int, int]
) -> None:
    x = (RANDOM.normal(size=(3, 8, *size)) + 1).astype(np.float32)
    fires(form(), norm_graph("N,8,H,W"), {"x": x})
    fires(form(), norm_graph("N,8,H,3"), {"x": x[..., :3]})


def test_it_keeps_away_from_unknown_channels_and_from_older_graphs() -> None:
    keeps_away(ChannelwiseNorms(), norm_graph("2,C,5,3"))
    keeps_away(ChannelwiseNorms(), norm_graph(head=18))


def test_it_keeps_away_from_what_the_graph_gives_out() -> None:
    text = """
    agraph (float[2,8,5,3] x) => (float[2,8,5,3] n) {
        n = GroupNormalization <num_groups = 4> (x, gamma, beta)
    }"""
    keeps_away(ChannelwiseNorms(), graph(text, gamma=np.ones(8, np.float32), beta=np.ones(8, np.float32)))


# -- PixelsAsTokens ----------------------------------------------------------------------------------------

TOKENS = """
agraph (float[2,8,3,5] x) => (float[2,8,3,5] y) <int64[3] flat = {2, 8, 15}, int64[4] image = {2, 8, 3, 5}> {
    x0 = Abs (x)
    r = Reshape (x0, flat)
    NORM
    t = Transpose <perm = [0, 2, 1]> (n)
    s = Sigmoid (t)
    b = Transpose <perm = [BACK]> (s)
    p = Reshape (b, image)
    y = Neg (p)
}
"""
SHAPES = {
    "x0": (2, 8, 3, 5),
    **dict.fromkeys(("r", "n", "b"), (2, 8, 15)),
    **dict.fromkeys(("t", "s"), (2, 15, 8)),
    "p": (2, 8, 3, 5),
}


def tokens_graph(norm: bool = True, back: str = "0, 2, 1", **shapes: tuple[int | str, ...]) -> ir.Model:
    line = "n = GroupNormalization <num_groups = 4> (r, gamma, beta)" if norm else "n = Identity (r)"
    text = TOKENS.replace("NORM", line).replace("BACK", back)
    arrays = {name: RANDOM.normal(size=8).astype(np.float32) for name in ("gamma", "beta")} if norm else {}
    return graph(text, SHAPES | shapes, **arrays)


def test_pixels_become_tokens_by_one_transposition_each_way() -> None:
    model = tokens_graph()
    fires(PixelsAsTokens(), model)
    perms = [tuple(n.attributes["perm"].as_ints()) for n in model.graph if n.op_type == "Transpose"]
    assert (0, 2, 3, 1) in perms
    assert (0, 3, 1, 2) in perms
    norm = next(node for node in model.graph if node.op_type == "GroupNormalization")
    assert norm.inputs[0].shape.rank() == 4
    adapt(model, ())  # removes what nothing reads any more
    assert (0, 2, 1) not in [
        tuple(n.attributes["perm"].as_ints()) for n in model.graph if n.op_type == "Transpose"
    ]


def test_it_keeps_away_from_unknown_sizes() -> None:
    unknown = {"x0": (2, 8, "H", 5), "p": (2, 8, "H", 5)}
    keeps_away(PixelsAsTokens(), tokens_graph(**unknown))


def test_it_keeps_away_from_a_reshape_that_moves_channels() -> None:
    text = """
    agraph (float[2,8,3,5] x) => (float[2,24,5] y) <int64[3] flat = {2, 5, 24}> {
        r = Reshape (x, flat)
        t = Transpose <perm = [0, 2, 1]> (r)
        y = Neg (t)
    }"""
    keeps_away(PixelsAsTokens(), graph(text, {"r": (2, 5, 24), "t": (2, 24, 5)}))


# -- TransposedKeys ----------------------------------------------------------------------------------------

KEYS = """
agraph (float[2,3,4,5] x) => (float[2,3,5,4] y)
<int64[1] zero = {0}, int64[1] minus = {-1}, int64[1] second = {-2}, int64[1] most = {9223372036854775807}> {
    k = Abs (x)
    s = Shape (k)
    last = Slice (s, minus, most)
    before = Slice (s, second, minus)
    lead = Slice (s, zero, second)
    fold = Concat <axis = 0> (minus, FOLD)
    unfold = Concat <axis = 0> (lead, last, before)
    a = Reshape (k, fold)
    b = Transpose <perm = [PERM]> (a)
    c = Reshape (b, unfold)
    y = Neg (c)
}
"""


def keys_graph(fold: str = "before, last", perm: str = "0, 2, 1") -> ir.Model:
    return graph(KEYS.replace("FOLD", fold).replace("PERM", perm), {"k": (2, 3, 4, 5)})


def test_a_swap_of_the_last_axes_is_one_transposition() -> None:
    model = keys_graph()
    fires(TransposedKeys(), model)
    adapt(model, ())
    assert operators(model) == ["Abs", "Transpose", "Neg"]


def test_it_keeps_away_from_another_order_and_from_other_shapes() -> None:
    keeps_away(TransposedKeys(), keys_graph(perm="0, 1, 2"))
    keeps_away(TransposedKeys(), keys_graph(fold="last, before"))


# -- ScaledScores ------------------------------------------------------------------------------------------

SCORES = """
agraph (float[2,3,4,5] q, float[2,3,5,4] k) => (float[2,3,4,4] y) <float[1] f = {0.5}, float[SHAPE] g = {VALUE}> {
    a = Mul (q, f)
    b = Mul (g, k)
    m = MatMul (a, b)
    y = Softmax (m)
}
"""


def scores_graph(shape: str = "1", value: str = "0.25") -> ir.Model:
    known = {"a": (2, 3, 4, 5), "b": (2, 3, 5, 4), "m": (2, 3, 4, 4)}
    return graph(SCORES.replace("SHAPE", shape).replace("VALUE", value), known)


def test_the_scores_are_scaled_once() -> None:
    model = scores_graph()
    fires(ScaledScores(), model)
    adapt(model, ())
    assert operators(model) == ["MatMul", "Mul", "Softmax"]


def test_a_factor_for_each_column_stays_where_it_is() -> None:
    model = scores_graph("4", "1.0, 2.0, 3.0, 4.0")
    fires(ScaledScores(), model)
    adapt(model, ())
    assert operators(model) == ["Mul", "MatMul", "Mul", "Softmax"]


# -- together ----------------------------------------------------------------------------------------------


def test_names_of_layers_survive() -> None:
    """MACs and kernels are looked up by the names of weighted nodes."""
    model = scores_graph()
    named = {node.name for node in model.graph if node.op_type == "MatMul"}
    assert adapt(model, CHANNELS_LAST)
    assert {node.name for node in model.graph if node.op_type == "MatMul"} == named
    assert not adapt(model, CHANNELS_LAST)
