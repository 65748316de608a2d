"""Each rewrite on the smallest graph: it fires, it keeps away where its rules say so, and nothing it computes
changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdeploy.export.graph import constant
from qdeploy.export.passes.names import Names, tensor_name
from qdeploy.export.passes.packed_codes import PackedCodes
from qdeploy.export.passes.shared_computations import SharedComputations
from qdeploy.export.passes.shared_quantizers import SharedQuantizers
from qdeploy.export.passes.split_shortcut import SplitShortcut
from qdeploy.export.passes.transposed_weights import TransposedWeights
from tests.export.graphs import fires, graph, keeps_away, operators, random_inputs, run

# -- SplitShortcut -----------------------------------------------------------------------------------------

SPLIT = """
agraph (float[2,3,4,4] a, float[2,5,4,4] b) => (float[2,8,4,4] main, float[2,C,4,4] u, float[2,D,4,4] v)
<int64[2] sizes = {SIZES}> {
    c = Concat <axis = CONCAT> (a, b)
    main = Relu (c)
    p, q = Split <axis = AXIS> (c, sizes)
    u = Neg (p)
    v = Abs (q)
}
"""


def split_graph(
    sizes: str = "3, 5", axis: int = 1, concat: int = 1, shape: tuple[int | str, ...] | None = (2, 8, 4, 4)
) -> ir.Model:
    text = SPLIT.replace("SIZES", sizes).replace("AXIS", str(axis)).replace("CONCAT", str(concat))
    return graph(text, {"c": shape} if shape else None)


@pytest.mark.parametrize(("axis", "concat"), [(1, 1), (-3, 1), (1, -3)])
def test_a_split_of_a_concat_reads_what_was_before_it(axis: int, concat: int) -> None:
    """The Concat stays for the other branch, whose normalisation reads the whole."""
    model = split_graph(axis=axis, concat=concat)
    fires(SplitShortcut(), model)
    assert operators(model) == ["Concat", "Relu", "Neg", "Abs"]
    neg, absolute = (next(node for node in model.graph if node.op_type == op) for op in ("Neg", "Abs"))
    assert [neg.inputs[0], absolute.inputs[0]] == list(model.graph.inputs)


def test_a_concat_without_other_users_is_left_to_clean_up() -> None:
    model = split_graph()
    fires(SplitShortcut(), model)
    assert operators(model).count("Concat") == 1


def test_it_keeps_away_from_a_cut_at_another_place() -> None:
    keeps_away(SplitShortcut(), split_graph(sizes="5, 3"))


def test_it_keeps_away_from_a_cut_along_another_axis() -> None:
    keeps_away(SplitShortcut(), split_graph(sizes="1, 3", axis=2))


def test_it_keeps_away_where_the_rank_is_unknown() -> None:
    keeps_away(SplitShortcut(), split_graph(shape=None))


def test_it_keeps_away_from_sizes_that_are_computed_and_from_parts_of_unknown_size() -> None:
    computed = graph(
        """
        agraph (float[2,3] a, float[2,5] b, int64[2] sizes) => (float[2,m] u, float[2,n] v) {
            c = Concat <axis = 1> (a, b)
            u, v = Split <axis = 1> (c, sizes)
        }
        """,
        {"c": (2, 8)},
    )
    keeps_away(SplitShortcut(), computed)
    unknown = graph(
        """
        agraph (float[2,x] a, float[2,y] b) => (float[2,m] u, float[2,n] v)
        <int64[2] sizes = {3, 5}> {
            c = Concat <axis = 1> (a, b)
            u, v = Split <axis = 1> (c, sizes)
        }
        """,
        {"c": (2, "z")},
    )
    keeps_away(SplitShortcut(), unknown)


def test_it_keeps_away_from_a_split_of_anything_else_and_into_another_number_of_parts() -> None:
    alone = graph(
        """
        agraph (float[2,8] a) => (float[2,3] u, float[2,5] v)
        <int64[2] sizes = {3, 5}> {
            c = Relu (a)
            u, v = Split <axis = 1> (c, sizes)
        }
        """,
        {"c": (2, 8)},
    )
    keeps_away(SplitShortcut(), alone)
    three = graph(
        """
        agraph (float[2,3] a, float[2,5] b) => (float[2,3] u, float[2,2] v, float[2,3] w)
        <int64[3] sizes = {3, 2, 3}> {
            c = Concat <axis = 1> (a, b)
            u, v, w = Split <axis = 1> (c, sizes)
        }
        """,
        {"c": (2, 8)},
    )
    keeps_away(SplitShortcut(), three)


# -- TransposedWeights -------------------------------------------------------------------------------------

CODES = np.random.default_rng(1).integers(-128, 128, (5, 3)).astype(np.int8)
SCALES = np.linspace(0.01, 0.05, 5, dtype=np.float32)


def matmul_graph(perm: str = "1, 0", axis: int = 0, extra: str = "", scale: np.ndarray = SCALES) -> ir.Model:
    outputs = "float[2,5] y" + (", float[5,3] z" if extra else "")
    return graph(
        f"""
        agraph (float[2,3] x) => ({outputs}) {{
            w = DequantizeLinear <axis = {axis}> (codes, scale)
            {extra}
            t = Transpose <perm = [{perm}]> (w)
            y = MatMul (x, t)
        }}
        """,
        codes=CODES,
        scale=scale,
    )


def test_a_weight_is_stored_as_matmul_reads_it() -> None:
    model = matmul_graph()
    fires(TransposedWeights(), model)
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    dequantize = next(iter(model.graph))
    assert dequantize.attributes["axis"].as_int() == 1
    stored = model.graph.initializers["codes"]
    assert stored.const_value is not None
    assert np.array_equal(stored.const_value.numpy(), CODES.T)
    assert list(stored.shape or ()) == [3, 5]


def test_a_weight_with_another_reader_keeps_its_form() -> None:
    keeps_away(TransposedWeights(), matmul_graph(extra="z = Relu (w)"))


def test_codes_with_another_reader_keep_their_form() -> None:
    shared = graph(
        """
        agraph (float[2,3] x) => (float[2,5] y, float[5,3] z) {
            w = DequantizeLinear <axis = 0> (codes, scale)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
            z = Cast <to = 1> (codes)
        }
        """,
        codes=CODES,
        scale=SCALES,
    )
    keeps_away(TransposedWeights(), shared)


def test_scales_along_the_other_axis_are_left_alone() -> None:
    keeps_away(TransposedWeights(), matmul_graph(axis=1, scale=SCALES[:3]))


def test_a_transposition_of_anything_else_is_left_alone() -> None:
    plain = graph(
        """
        agraph (float[5,3] w, float[2,3] x) => (float[2,5] y) {
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, t)
        }
        """
    )
    keeps_away(TransposedWeights(), plain)
    cube = graph(
        """
        agraph (float[5,3,2] w) => (float[3,5,2] y) {
            y = Transpose <perm = [1, 0, 2]> (w)
        }
        """
    )
    keeps_away(TransposedWeights(), cube)


def test_a_transposition_that_says_no_axes_reverses_them() -> None:
    """``perm`` may be left out; for a matrix that is the same transposition."""
    model = graph(
        """
        agraph (float[2,3] x) => (float[2,5] y) {
            w = DequantizeLinear <axis = 0> (codes, scale)
            t = Transpose (w)
            y = MatMul (x, t)
        }
        """,
        codes=CODES,
        scale=SCALES,
    )
    fires(TransposedWeights(), model)


# -- SharedQuantizers --------------------------------------------------------------------------------------

PAIRS = """
agraph (float[2,3] x, float[2,3] other) => (float[2,3] y, float[2,3] z)
<float s = {0.1}, float t = {SECOND}, int8 n = {0}, int8 m = {ZERO}> {
    a = QuantizeLinear (x, s, n)
    b = DequantizeLinear (a, s, n)
    y = Relu (b)
    c = QuantizeLinear (READS, t, m)
    d = DequantizeLinear (c, t, m)
    z = Neg (d)
}
"""


def pair_graph(second: str = "0.1", zero: str = "0", reads: str = "x") -> ir.Model:
    return graph(PAIRS.replace("SECOND", second).replace("ZERO", zero).replace("READS", reads))


def test_equal_pairs_on_one_tensor_become_one() -> None:
    model = pair_graph()
    fires(SharedQuantizers(), model)
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "Relu", "Neg"]
    readers = [node.inputs[0] for node in model.graph if node.op_type in ("Relu", "Neg")]
    assert readers[0] is readers[1]


@pytest.mark.parametrize(
    "change",
    [{"second": "0.1000001"}, {"zero": "1"}, {"reads": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_pairs_that_differ_stay_two(change: dict[str, str]) -> None:
    keeps_away(SharedQuantizers(), pair_graph(**change))


def test_pairs_of_another_code_type_stay_two() -> None:
    text = PAIRS.replace("SECOND", "0.1").replace("READS", "x").replace("int8 m = {ZERO}", "uint8 m = {0}")
    keeps_away(SharedQuantizers(), graph(text))


COMPUTED = """
agraph (float[2,3] x, float s, float t) => (float[2,3] y, float[2,3] z)
<int8 n = {0}> {
    a = QuantizeLinear (x, s, n)
    b = DequantizeLinear (a, s, n)
    c = QuantizeLinear (x, SECOND, n)
    d = DequantizeLinear (c, SECOND, n)
    y = Relu (b)
    z = Neg (d)
}
"""


def test_pairs_with_two_computed_scales_stay_two() -> None:
    keeps_away(SharedQuantizers(), graph(COMPUTED.replace("SECOND", "t")))


def test_pairs_with_one_computed_scale_become_one() -> None:
    model = graph(COMPUTED.replace("SECOND", "s"))
    fires(SharedQuantizers(), model)
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "Relu", "Neg"]


def test_pairs_along_other_axes_stay_two() -> None:
    keeps_away(
        SharedQuantizers(),
        graph(
            """
            agraph (float[3,3] x) => (float[3,3] y, float[3,3] z)
            <float[3] s = {0.1, 0.2, 0.3}, int8[3] n = {0, 0, 0}> {
                a = QuantizeLinear <axis = 0> (x, s, n)
                y = DequantizeLinear <axis = 0> (a, s, n)
                c = QuantizeLinear <axis = 1> (x, s, n)
                z = DequantizeLinear <axis = 1> (c, s, n)
            }
            """
        ),
    )


def test_outputs_of_the_graph_keep_their_nodes() -> None:
    pairs = graph(
        """
        agraph (float[2,3] x) => (float[2,3] y, float[2,3] z)
        <float s = {0.1}, int8 n = {0}> {
            a = QuantizeLinear (x, s, n)
            y = DequantizeLinear (a, s, n)
            z = DequantizeLinear (a, s, n)
        }
        """
    )
    keeps_away(SharedQuantizers(), pairs)
    parts = graph(
        """
        agraph (float[2,3] a, float[2,5] b) => (float[2,3] u, float[2,5] v)
        <int64[2] sizes = {3, 5}> {
            c = Concat <axis = 1> (a, b)
            u, v = Split <axis = 1> (c, sizes)
        }
        """,
        {"c": (2, 8)},
    )
    keeps_away(SplitShortcut(), parts)
    weight = graph(
        """
        agraph () => (float[3,5] y) {
            w = DequantizeLinear <axis = 0> (codes, scale)
            y = Transpose <perm = [1, 0]> (w)
        }
        """,
        codes=CODES,
        scale=SCALES,
    )
    keeps_away(TransposedWeights(), weight)


BLOCK_CODES = np.random.default_rng(2).integers(-8, 8, (5, 128)).astype(np.int8)
BLOCK_SCALES = np.random.default_rng(3).uniform(0.01, 0.1, (5, 2)).astype(np.float32)
BLOCKED = """
agraph (float[2,128] x) => (float[2,5] y, float[5,2] z) {
    w = DequantizeLinear <axis = 1, block_size = 64> (codes, scale)
    t = Transpose <perm = [1, 0]> (w)
    y = MatMul (x, t)
    z = READS
}
"""


def blocked_graph(reads: str = "Constant <value = float[5,2] {0,0,0,0,0,0,0,0,0,0}> ()") -> ir.Model:
    return graph(BLOCKED.replace("READS", reads), codes=BLOCK_CODES, scale=BLOCK_SCALES)


def test_scales_in_blocks_are_transposed_with_their_codes() -> None:
    model = blocked_graph()
    fires(TransposedWeights(), model)
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert dequantize.attributes["axis"].as_int() == 0
    codes, scale = (constant(value) for value in dequantize.inputs)
    assert np.array_equal(codes, BLOCK_CODES.T)
    assert np.array_equal(scale, BLOCK_SCALES.T)
    assert "Transpose" not in operators(model)


def test_a_block_size_of_0_means_no_blocks() -> None:
    """As tracing writes it out."""
    model = matmul_graph()
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", 0)
    keeps_away(PackedCodes(), model)
    fires(TransposedWeights(), model)


def test_scales_in_blocks_that_others_read_stay_as_they_are() -> None:
    keeps_away(TransposedWeights(), blocked_graph("Neg (scale)"))


# -- PackedCodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_codes_in_blocks_are_stored_in_four_bits(transposed: bool) -> None:
    model = blocked_graph()
    if transposed:
        TransposedWeights()(model)
    fires(PackedCodes(), model)
    stored = next(t for t in ir.to_proto(model).graph.initializer if t.name == "codes")
    codes = (BLOCK_CODES.T if transposed else BLOCK_CODES).flatten()
    assert stored.data_type == onnx.TensorProto.INT4
    low_first = (codes[0::2] & 15) | (codes[1::2] & 15) << 4
    assert np.frombuffer(stored.raw_data, np.uint8).tolist() == low_first.view(np.uint8).tolist()


def test_codes_that_need_more_bits_or_have_other_users_stay_as_they_are() -> None:
    large = BLOCK_CODES.copy()
    large[0, 0] = 8
    keeps_away(PackedCodes(), graph(BLOCKED.replace("READS", "Neg (scale)"), codes=large, scale=BLOCK_SCALES))
    per_channel = matmul_graph()
    keeps_away(PackedCodes(), per_channel)
    read_twice = BLOCKED.replace("READS", "Cast <to = 1> (codes)").replace("float[5,2] z", "float[5,128] z")
    keeps_away(PackedCodes(), graph(read_twice, codes=BLOCK_CODES, scale=BLOCK_SCALES))


# -- Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traced", "expected"),
    [
        ("denoiser.mid.conv.inner.bias", "mid.conv.bias"),
        ("denoiser.mid.conv.weight_quantizers.0.frozen", "mid.conv.weight.0.codes"),
        ("denoiser.mid.conv.weight_quantizers.1.scale", "mid.conv.weight.1.scale"),
        ("denoiser.mid.conv.input_quantizers.0.frozen", "mid.conv.input.0.zero_point"),
        ("denoiser.mid.conv.input_quantizers.0.scale", "mid.conv.input.0.scale"),
        ("denoiser.conv_in.weight", "conv_in.weight"),
        ("val_17", "val_17"),
    ],
)
def test_tensors_are_named_as_in_the_checkpoint(traced: str, expected: str) -> None:
    assert tensor_name(traced) == expected


def named_graph() -> ir.Model:
    """Two convolutions of a split layer, one of a plain layer, and an attention product."""
    model = graph(
        """
        agraph (float[1,2,4,4] x, float[1,2,4,4] y) => (float[1,3,4,4] out, float[1,3,4,4] product) {
            w0 = DequantizeLinear <axis = 0> (first, scale)
            w1 = DequantizeLinear <axis = 0> (second, scale)
            u = Conv (x, w0, bias)
            v = Conv (y, w1)
            sum = Add (u, v)
            out = Conv (sum, plain)
            product = MatMul (out, sum)
        }
        """,
        first=np.ones((3, 2, 1, 1), np.int8),
        second=np.full((3, 2, 1, 1), 2, np.int8),
        scale=np.array([0.1, 0.2, 0.3], np.float32),
        bias=np.zeros(3, np.float32),
        plain=np.ones((3, 3, 1, 1), np.float32),
    )
    names = {
        "first": "denoiser.up.shortcut.weight_quantizers.0.frozen",
        "second": "denoiser.up.shortcut.weight_quantizers.1.frozen",
        "scale": "denoiser.up.shortcut.weight_quantizers.0.scale",
        "bias": "denoiser.up.shortcut.inner.bias",
        "plain": "denoiser.conv_out.weight",
    }
    for old, new in names.items():
        value = model.graph.initializers.pop(old)
        value.name = new
        model.graph.initializers[new] = value
    modules = ["up.shortcut"] * 5 + ["conv_out", "mid.attention"]
    for node, path in zip(model.graph, modules, strict=True):
        scopes = ["", "denoiser", f"denoiser.{path}", "call"]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(scopes)
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/me/qdeploy/model/folder.py", line 1'
        node.doc_string = "/home/me"
    model.graph.metadata_props["source"] = model.metadata_props["source"] = "/home/me"
    model.doc_string = model.graph.doc_string = "/home/me"
    return model


def test_weighted_nodes_bear_the_path_of_their_layer() -> None:
    model = named_graph()
    fires_once(model)
    assert [node.name for node in model.graph] == [
        "up.shortcut/DequantizeLinear/0",
        "up.shortcut/DequantizeLinear/1",
        "up.shortcut/0",
        "up.shortcut/1",
        "up.shortcut/Add/0",
        "conv_out",
        "mid.attention/MatMul/0",
    ]
    assert set(model.graph.initializers) == {
        "up.shortcut.weight.0.codes",
        "up.shortcut.weight.1.codes",
        "up.shortcut.weight.0.scale",
        "up.shortcut.bias",
        "conv_out.weight",
    }


def test_nothing_of_the_machine_that_traced_stays() -> None:
    model = named_graph()
    fires_once(model)
    data = ir.to_proto(model).SerializeToString()
    assert b"/home/me" not in data
    assert b"pkg.torch" not in data
    assert model.graph.name == "denoiser"


def fires_once(model: ir.Model) -> None:
    inputs = random_inputs(model)
    before = run(model, inputs)
    Names()(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, run(model, inputs), strict=True))
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


# -- shared computations -----------------------------------------------------------------------------------

FACTORS = np.array([0.5, 1, 2, 4], np.float32)
SCALED = """
agraph (float[2, 4] x, float[2, 4] y) => (float[2, 4] z) {
    a = Mul (x, f)
    b = Mul (x, g)
    z = Sub (a, b)
}
"""


def test_equal_factors_on_one_tensor_are_multiplied_once() -> None:
    model = graph(SCALED, f=FACTORS, g=FACTORS)
    fires(SharedComputations(), model)
    assert operators(model) == ["Mul", "Sub"]


def test_what_follows_from_what_is_equal_is_equal_too() -> None:
    model = graph(
        """
        agraph (float[2, 4] x) => (float[2, 2] z) {
            a = Gather <axis = 1> (x, f)
            b = Gather <axis = 1> (x, g)
            a0, a1 = Split <axis = 1, num_outputs = 2> (a)
            b0, b1 = Split <axis = 1, num_outputs = 2> (b)
            c = Sub (a0, b1)
            z = Add (c, b0)
        }
        """,
        f=np.array([2, 0, 1, 3]),
        g=np.array([2, 0, 1, 3]),
    )
    fires(SharedComputations(), model)
    assert operators(model) == ["Gather", "Split", "Sub", "Add"]


@pytest.mark.parametrize(
    ("old", "new", "other"),
    [
        ("", "", 2 * FACTORS),
        ("", "", FACTORS.reshape(1, 4)),
        ("b = Mul (x, g)", "b = Mul (y, g)", FACTORS),
        ("b = Mul (x, g)", "b = Div (x, g)", FACTORS),
        ("a = Mul (x, f)\n    b = Mul (x, g)", "a = Mul (f, f)\n    b = Mul (g, g)", FACTORS),
    ],
    ids=["values", "shapes", "tensors", "operators", "constants alone"],
)
def test_what_differs_is_computed_twice(old: str, new: str, other: np.ndarray) -> None:
    keeps_away(SharedComputations(), graph(SCALED.replace(old, new) if old else SCALED, f=FACTORS, g=other))


def test_weighted_nodes_stay_two() -> None:
    weight = np.eye(4, dtype=np.float32)
    keeps_away(SharedComputations(), graph(SCALED.replace("Mul", "MatMul"), f=weight, g=weight))
