"""The rewrites of ONNX Runtime's dialect: the same function, in the operators that run as integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qdeploy.calibrate.methods import minmax
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.macs import graph_macs, meant_int8
from qdeploy.export.passes.gathered_convolutions import GatheredConvolutions
from qdeploy.export.passes.integer_products import IntegerProducts
from qdeploy.export.passes.sunk_transpositions import SunkTranspositions
from qdeploy.export.passes.unsigned_codes import UnsignedCodes
from qdeploy.export.trace import OUTPUT, trace
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.modes import freeze
from qdeploy.system.decibels import sqnr_by_row
from tests.export.graphs import graph, keeps_away, operators, random_inputs, run
from tests.helpers import MemoryRows, calibrating, relative, tiny_unet

RANDOM = np.random.default_rng(3)
ROUNDING = 2e-6  # sums of floats in another order


def codes(*shape: int) -> np.ndarray:
    """Weights of seven bits, whose products ONNX Runtime adds exactly on processors without VNNI too."""
    return RANDOM.integers(-63, 64, shape).astype(np.int8)


def scales(count: int) -> np.ndarray:
    return np.linspace(0.01, 0.05, count, dtype=np.float32)


def fires(rewrite: InPlacePass, model: ir.Model, tolerance: float = ROUNDING) -> list[str]:
    """The pass fires once, and the graph computes the same; its operators afterwards."""
    inputs = random_inputs(model)
    before = run(model, inputs)
    assert rewrite(model).modified
    RemoveUnusedNodesPass()(model)
    for first, second in zip(before, run(model, inputs), strict=True):
        assert relative(torch.from_numpy(first), torch.from_numpy(second)) <= tolerance
    assert not rewrite(model).modified
    return operators(model)


# -- UnsignedCodes -----------------------------------------------------------------------------------------

QUANTIZED = """
agraph (float[2,3,6,6] x) => (float[2,3,6,6] y, OUTPUT)
<float s = {0.02}, int8 z = {ZERO}> {
    q = QuantizeLinear (x, s, z)
    y = DequantizeLinear (q, s, z)
    EXTRA
}
"""


def quantized(zero: str = "0", output: str = "float[2,3,6,6] v", extra: str = "v = Neg (y)") -> ir.Model:
    return graph(QUANTIZED.replace("ZERO", zero).replace("OUTPUT", output).replace("EXTRA", extra))


@pytest.mark.parametrize("zero", ["0", "-100", "127"])
def test_unsigned_codes_mean_the_same_bit_for_bit_even_where_they_saturate(zero: str) -> None:
    model = quantized(zero)
    fires(UnsignedCodes(), model, tolerance=0)
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert node.inputs[2] is not None
    assert node.inputs[2].dtype == ir.DataType.UINT8


def test_codes_that_others_read_stay_signed() -> None:
    keeps_away(UnsignedCodes(), quantized(output="int8[2,3,6,6] q", extra=""))
    keeps_away(UnsignedCodes(), quantized(extra="r = Cast <to = 1> (q)\nv = Neg (r)"))
    other = "o = DequantizeLinear (q, s, t)\nv = Neg (o)"
    text = QUANTIZED.replace("ZERO", "0").replace("OUTPUT", "float[2,3,6,6] v").replace("EXTRA", other)
    keeps_away(UnsignedCodes(), graph(text.replace("int8 z = {0}", "int8 z = {0}, int8 t = {1}")))


# -- IntegerProducts ---------------------------------------------------------------------------------------


def product(
    body: str, weight: np.ndarray, axis: int, zero: str = "uint8 z = {117}", extra: str = ""
) -> ir.Model:
    """A product ``y`` of dequantized codes of x [2, 4, 8] (or [4, 8]) and a weight w."""
    shape = "4,8" if "Gemm" in body else "2,4,8"
    arrays = {"codes": weight, "scale": scales(weight.shape[axis])}
    if "bias" in body:
        arrays["bias"] = RANDOM.normal(size=5).astype(np.float32)
    return graph(
        f"""
        agraph (float[{shape}] x) => (float[{shape[:-1]}5] y)
        <float s = {{0.02}}, {zero}{extra}> {{
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            w = DequantizeLinear <axis = {axis}> (codes, scale{", wz" if extra else ""})
            {body}
        }}
        """,
        {"q": tuple(int(size) for size in shape.split(","))},
        **arrays,
    )


@pytest.mark.parametrize(
    ("body", "axis", "shape"),
    [
        ("y = MatMul (d, w)", 1, (8, 5)),
        ("m = MatMul (d, w)\ny = Add (m, bias)", 1, (8, 5)),
        ("m = MatMul (d, w)\ny = Add (bias, m)", 1, (8, 5)),
        ("y = Gemm <transB = 1> (d, w, bias)", 0, (5, 8)),
        ("y = Gemm (d, w)", 1, (8, 5)),
    ],
)
def test_a_linear_layer_becomes_one_integer_product(body: str, axis: int, shape: tuple[int, int]) -> None:
    model = unsigned(product(body, codes(*shape), axis))
    assert fires(IntegerProducts(), model) == ["QuantizeLinear", "MatMulIntegerToFloat"]


def unsigned(model: ir.Model) -> ir.Model:
    """Give codes the type that tracing would have given them."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[2] is not None:
            node.outputs[0].dtype = node.inputs[2].dtype
    return model


def test_products_that_are_something_else_stay() -> None:
    keeps_away(IntegerProducts(), unsigned(product("y = MatMul (d, w)", codes(8, 5), 1, "int8 z = {0}")))
    keeps_away(IntegerProducts(), unsigned(product("y = Gemm <alpha = 2.0> (d, w)", codes(8, 5), 1)))
    keeps_away(
        IntegerProducts(), unsigned(product("y = MatMul (d, w)", codes(8, 5), 0))
    )  # scales along the input
    shifted = product("y = MatMul (d, w)", codes(8, 5), 1, extra=", int8[5] wz = {1, 2, 3, 4, 5}")
    keeps_away(IntegerProducts(), unsigned(shifted))


def test_a_sum_that_is_no_bias_stays_an_add() -> None:
    model = unsigned(product("m = MatMul (d, w)\ny = Add (m, m)", codes(8, 5), 1))
    assert fires(IntegerProducts(), model) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]


# -- GatheredConvolutions ----------------------------------------------------------------------------------


def convolution(
    attributes: str = "pads = [1, 1, 1, 1]",
    kernel: tuple[int, int] = (3, 3),
    bias: bool = True,
    before: str = "",
    size: str = "6,7",
    features: int = 3,
) -> ir.Model:
    """A quantized convolution of x [2, 3, 6, 7] by 5 kernels; ``before`` makes ``p`` of x."""
    arrays = {"codes": codes(5, features, *kernel), "scale": scales(5)}
    if bias:
        arrays["bias"] = RANDOM.normal(size=5).astype(np.float32)
    height, width = (int(n) for n in size.split(","))
    model = graph(
        f"""
        agraph (float[2,3,6,7] x) => (float[2,5,h,w] y)
        <float s = {{0.02}}, uint8 z = {{117}}, int64[8] pads = {{0, 0, 0, 1, 0, 0, 2, 1}},
         float[4] sizes = {{1, 1, 2, 2}}, float zero = {{0}}, float one = {{1}}> {{
            {before}
            q = QuantizeLinear ({"p" if before else "x"}, s, z)
            d = DequantizeLinear (q, s, z)
            v = DequantizeLinear <axis = 0> (codes, scale)
            y = Conv <{attributes}> (d, v{", bias" if bias else ""})
        }}
        """,
        dict.fromkeys("pqd", (2, 3, height, width)),
        **arrays,
    )
    return unsigned(model)


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("pads = [1, 1, 1, 1]", (3, 3)),
        ("strides = [2, 2]", (3, 3)),
        ("strides = [2, 1], pads = [0, 1, 2, 0]", (3, 2)),
        ("dilations = [2, 1], pads = [2, 0, 2, 0]", (3, 3)),
        ("strides = [2, 2]", (1, 1)),
    ],
)
def test_a_convolution_becomes_a_product_of_gathered_pixels(attributes: str, kernel: tuple[int, int]) -> None:
    model = convolution(attributes, kernel, bias=kernel[1] == 3)
    found = Counter(fires(GatheredConvolutions(), model))
    assert found["Conv"] == 0
    assert (found["Gather"], found["Pad"]) == (1, int("pads" in attributes))


def test_one_pixel_kernels_gather_nothing() -> None:
    found = fires(GatheredConvolutions(), convolution("group = 1", (1, 1)))
    assert found == ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat", "Transpose"]


@pytest.mark.parametrize(
    ("before", "size"),
    [
        ("p = Pad (x, pads, zero)", "8,9"),
        ('p = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> '
         "(x, , sizes)", "12,14"),
    ],
)  # fmt: skip
def test_padding_and_enlarging_in_front_go_into_the_indices(before: str, size: str) -> None:
    found = Counter(fires(GatheredConvolutions(), convolution(before=before, size=size)))
    assert found["Resize"] == 0
    assert found["Gather"] == 1
    assert found["QuantizeLinear"] == 1


def test_padding_with_anything_but_zeros_stays() -> None:
    before = "p = Pad (x, pads, one)"
    found = Counter(fires(GatheredConvolutions(), convolution(before=before, size="8,9")))
    assert found["Pad"] == 2


def test_groups_unknown_sizes_and_automatic_padding_stay_convolutions() -> None:
    grouped = convolution("group = 3, pads = [1, 1, 1, 1]", features=1)
    grouped.graph.initializers["codes"].shape = ir.Shape((5, 1, 3, 3))
    assert not GatheredConvolutions()(grouped).modified
    assert not GatheredConvolutions()(convolution('auto_pad = "SAME_UPPER"')).modified
    unknown = convolution()
    for node in unknown.graph:
        node.outputs[0].shape = None
    assert not GatheredConvolutions()(unknown).modified


# -- SunkTranspositions ------------------------------------------------------------------------------------


def moved(body: str, output: str, shapes: dict[str, tuple[int, ...]], **arrays: np.ndarray) -> ir.Model:
    """x [2, 3, 4, 5], channels-last, as ``f`` in ONNX's order, and what ``body`` makes of it."""
    text = f"""
    agraph (float[2,3,4,5] x, float[2,5,3,4] r) => ({output}) {{
        f = Transpose <perm = [0, 3, 1, 2]> (x)
        {body}
    }}
    """
    return graph(text, {"f": (2, 5, 3, 4), **shapes}, **arrays)


FIRST = (2, 5, 3, 4)


@pytest.mark.parametrize(
    "body",
    [
        "a = Sigmoid (f)",
        "b = Sigmoid (f)\na = Mul (f, b)",
        "a = Add (f, r)",
        "a = Mul (number, f)",
        "a = Mul (f, channels)",
        "c = Concat <axis = 1> (f, r, f)\na = Neg (c)",
        "m = ReduceMean <keepdims = 1> (f, axes)\na = Sub (f, m)",
        "c = Reshape (f, flat)\nn = Neg (c)\na = Reshape (n, back)",
    ],
)  # fmt: skip
def test_transpositions_sink_until_they_cancel(body: str) -> None:
    shapes = {"a": FIRST, "b": FIRST, "m": (2, 5, 1, 1), "c": FIRST, "n": (2, 5, 12)}
    if "Concat" in body:
        shapes |= {"a": (2, 15, 3, 4), "c": (2, 15, 3, 4)}
    if "flat" in body:
        shapes["c"] = (2, 5, 12)
    stored = {
        "number": np.array([[[[0.5]]]], np.float32),
        "channels": RANDOM.normal(size=(1, 5, 1, 1)).astype(np.float32),
        "axes": np.array([2, 3]),
        "flat": np.array([-1, 5, 12]),
        "back": np.array([-1, 5, 3, 4]),
    }
    model = moved(
        f"{body}\nt = Transpose <perm = [0, 2, 3, 1]> (a)\ny = Neg (t)",
        "float[2,3,4,c] y",
        shapes,
        **{name: array for name, array in stored.items() if name in body},
    )
    inputs = random_inputs(model)
    (before,) = run(model, inputs)
    while SunkTranspositions()(model).modified:
        RemoveUnusedNodesPass()(model)
    (after,) = run(model, inputs)
    assert relative(torch.from_numpy(before), torch.from_numpy(after)) < (1e-6 if "Mean" in body else 1e-12)
    # What comes in ONNX's own order is transposed, once.
    assert operators(model).count("Transpose") == int(" r" in body)


def test_other_operators_see_what_they_saw() -> None:
    model = moved("y = Softmax <axis = 1> (f)", "float[2,5,3,4] y", {})
    keeps_away(SunkTranspositions(), model)
    sliced = moved("y = ReduceMean <keepdims = 1> (f, axes)", "float[2,5,3,1] y", {}, axes=np.array([3]))
    keeps_away(SunkTranspositions(), sliced)


# -- all of them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int7", "int4"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A small U-Net with attention and shortcuts, traced, in both dialects; and what torch simulates."""
    folder = tmp_path_factory.mktemp(request.param)
    denoiser, data = tiny_unet((16, 32)), MemoryRows.noisy(images=6)
    with calibrating(denoiser, data, folder / "checkpoint", weights=request.param) as session:
        minmax.WeightRanges(finder="lp").run(session)
        minmax.ActivationRanges(finder="lp").run(session)
        for layer in quantized_layers(denoiser).values():
            minmax.round_to_nearest(layer)
    rows = data.inputs(list(range(0, len(data), 4)))
    with torch.no_grad():
        simulated = denoise(denoiser, rows)
    freeze(denoiser)
    found: dict[str, object] = {"rows": rows, "simulated": simulated}
    traced = trace(denoiser, rows)
    for target in ("portable", "onnxruntime"):
        path = folder / target / "model.onnx"
        save(lower(traced.clone(), target), path)
        found[target] = path
    return found


def outputs(path: Path, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = []
    for row in range(len(rows["sample"])):
        feed = {name: x[row : row + 1].numpy() for name, x in rows.items() if name != "timestep"}
        feed["timestep"] = rows["timestep"][row].float().numpy()
        results.append(torch.from_numpy(session.run([OUTPUT], feed)[0]))
    return torch.cat(results)


@pytest.mark.slow
def test_a_network_computes_what_was_simulated(network: dict[str, object]) -> None:
    own = outputs(network["onnxruntime"], network["rows"])  # type: ignore[arg-type]
    assert median(sqnr_by_row(own, network["simulated"])) >= 45  # type: ignore[arg-type]
    plain = outputs(network["portable"], network["rows"])  # type: ignore[arg-type]
    assert median(sqnr_by_row(own, plain)) >= 45


@pytest.mark.slow
def test_every_quantized_layer_is_a_product_under_its_own_name(network: dict[str, object]) -> None:
    plain, own = network["portable"], network["onnxruntime"]
    assert isinstance(plain, Path)
    assert isinstance(own, Path)
    assert meant_int8(own) == meant_int8(plain)
    shapes = {"sample": [2, 3, 8, 8], "timestep": []}
    assert graph_macs(own, shapes) == graph_macs(plain, shapes)
    model = ir.load(own)
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["DequantizeLinear"] == kinds["GroupNormalization"] == kinds["Resize"] == 0
    assert any(name.endswith(".weight.0.codes") for name in model.graph.initializers)
