"""Convolutions of doubled images become transposed ones: equal within float32's rounding, and only those."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdeploy.export.passes.upsampled_convolutions import UpsampledConvolutions
from tests.export.graphs import graph, keeps_away, operators, random_inputs, run

RANDOM = np.random.default_rng(2)


def doubled(
    resize: str = 'mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"',
    conv: str = "pads = [1, 1, 1, 1]",
    factors: tuple[float, ...] = (1, 1, 2, 2),
    kernel: int = 3,
    size: str = "5,7",
    more: str = "",
    bias: bool = True,
) -> ir.Model:
    text = f"""
    agraph (float[N,4,{size}] x) => (float[N,6,A,B] y) {{
        r = Resize <{resize}> (x, , factors)
        {more}
        c = Conv <{conv}> (r, weight{", bias" if bias else ""})
        y = Neg (c)
    }}"""
    arrays = {
        "factors": np.array(factors, np.float32),
        "weight": RANDOM.normal(size=(6, 4, kernel, kernel)).astype(np.float32),
    }
    if bias:
        arrays["bias"] = RANDOM.normal(size=6).astype(np.float32)
    return graph(text, {"c": ("N", 6, "A", "B")}, **arrays)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 8)])
def test_the_products_are_four_ninths_and_the_result_is_the_same(bias: bool, size: tuple[int, int]) -> None:
    model = doubled(size="H,W", bias=bias)
    inputs = {"x": RANDOM.normal(size=(2, 4, *size)).astype(np.float32)}
    before = run(model, inputs)[0]
    assert UpsampledConvolutions()(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = run(model, inputs)[0]
    assert after.shape == before.shape == (2, 6, 2 * size[0], 2 * size[1])
    assert np.abs(after - before).max() <= 1e-6 * np.abs(before).max()
    assert "Conv" not in operators(model)
    weight = next(n for n in model.graph if n.op_type == "ConvTranspose").inputs[1].const_value
    assert weight.shape == (4, 6, 4, 4)  # of a quarter of the pixels: 16 / 4 instead of 9 products an output
    assert not UpsampledConvolutions()(model).modified


def test_the_layer_keeps_its_name_and_a_resize_with_other_users_stays() -> None:
    model = doubled(more="z = Neg (r)")
    model.graph.outputs.append(next(n for n in model.graph if n.outputs[0].name == "z").outputs[0])
    name = next(n for n in model.graph if n.op_type == "Conv").name = "up.conv"
    before = run(model, random_inputs_of_one(model))
    assert UpsampledConvolutions()(model).modified
    assert next(n for n in model.graph if n.op_type == "ConvTranspose").name == name
    for first, second in zip(before, run(model, random_inputs_of_one(model)), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def random_inputs_of_one(model: ir.Model) -> dict[str, np.ndarray]:
    model.graph.inputs[0].shape = ir.Shape((1, 4, 5, 7))
    return random_inputs(model)


LINEAR = 'mode = "linear", coordinate_transformation_mode = "asymmetric"'
ROUND = 'mode = "nearest", nearest_mode = "ceil", coordinate_transformation_mode = "asymmetric"'
CENTRES = 'mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "half_pixel"'


@pytest.mark.parametrize(
    "model",
    [
        doubled(resize=LINEAR),
        doubled(resize=ROUND),
        doubled(resize=CENTRES),
        doubled(factors=(1, 1, 3, 3)),
        doubled(factors=(1, 1, 2, 4)),
        doubled(conv="pads = [0, 0, 0, 0]"),
        doubled(conv="pads = [1, 1, 1, 1], strides = [2, 2]"),
        doubled(conv="pads = [2, 2, 2, 2], dilations = [2, 2]"),
        doubled(conv='auto_pad = "SAME_UPPER"'),
        doubled(kernel=1),
        doubled(kernel=5),
    ],
)
def test_it_keeps_away_from_everything_else(model: ir.Model) -> None:
    keeps_away(UpsampledConvolutions(), model)
