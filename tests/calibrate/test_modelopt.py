"""NVIDIA's ModelOpt as an oracle, where it is installed: the same scales from the same data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.awq import best_factors
from qdeploy.calibrate.methods.smoothquant import migration_factors, weight_ranges
from qdeploy.calibrate.smoothing import relative_factors, smooth
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.ranges import minmax_weights, to_scale
from qdeploy.recipe.formats import Format, fp8, int4b128, int8
from tests.helpers import relative

mtq = pytest.importorskip("modelopt.torch.quantization", reason="an oracle, and no dependency")


@pytest.fixture
def planted() -> tuple[nn.Sequential, Tensor]:
    """One linear layer and its inputs, four channels of which are louder than the others."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, x = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False), torch.randn(256, 128)
    x[:, [3, 40, 77, 101]] *= 30
    return model, x


def by_modelopt(model: nn.Sequential, x: Tensor, config: str, algorithm: Any = None) -> nn.Module:
    settings = copy.deepcopy(getattr(mtq, config))
    settings["algorithm"] = algorithm or settings["algorithm"]
    quantized: nn.Module = mtq.quantize(copy.deepcopy(model), settings, lambda network: network(x))
    return quantized


@pytest.mark.parametrize(
    ("config", "number_format"), [("INT8_DEFAULT_CFG", int8), ("FP8_DEFAULT_CFG", fp8)], ids=["int8", "fp8"]
)
def test_minmax_scales_are_its_scales(
    planted: tuple[nn.Sequential, Tensor], config: str, number_format: Format
) -> None:
    model, x = planted
    theirs: Any = by_modelopt(model, x, config)[0]  # type: ignore[index]
    scale, _ = to_scale(x.min(), x.max(), number_format)
    torch.testing.assert_close(theirs.input_quantizer.amax / number_format.qmax, scale)
    weights, _ = minmax_weights(model[0].weight, number_format)
    found = theirs.weight_quantizer.amax.flatten() / number_format.qmax
    torch.testing.assert_close(found, weights if len(found) > 1 else weights.amax(0, keepdim=True).view(-1))


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
def test_smoothquant_factors_are_its_factors(planted: tuple[nn.Sequential, Tensor], alpha: float) -> None:
    """Up to one factor for all channels, which ours leave out."""
    model, x = planted
    theirs: Any = by_modelopt(model, x, "INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": alpha})[0]  # type: ignore[index]
    given = weight_ranges(QuantizedLayer(model[0], None, None))
    ours = relative_factors(migration_factors(x.abs().amax(0), given, alpha))
    torch.testing.assert_close(ours, relative_factors(1 / theirs.input_quantizer.pre_quant_scale.flatten()))


def test_awq_is_as_good_as_its_awq(planted: tuple[nn.Sequential, Tensor]) -> None:
    """Its factors hold weights too (x^alpha / w^(1 - alpha)), so that errors are compared and not factors."""
    model, x = planted
    theirs = relative(by_modelopt(model, x, "INT4_AWQ_CFG")(x), model(x))
    layer = QuantizedLayer(model[0], int4b128, None)
    smooth(layer, best_factors([layer], x, 20, "minmax")[1])
    for quantizer, weight in layer.weight_pairs():
        quantizer.set(*minmax_weights(weight, int4b128))
    assert relative(layer(x), model(x)) < 1.05 * theirs
