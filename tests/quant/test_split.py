"""Split shortcuts: each half of a concatenation on its own grid, in torch (for ONNX see test_trace)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.modes import full_precision
from qdeploy.recipe.formats import Format, int4, int8, uint8
from tests.helpers import minmax_layer, relative

SPLIT = (12, 20)


def halves(low: float, high: float) -> Tensor:
    """Features whose two parts have standard deviations ``low`` and ``high``."""
    x = torch.randn(16, sum(SPLIT), 6, 6, generator=torch.Generator().manual_seed(0))
    x[:, : SPLIT[0]] *= low
    x[:, SPLIT[0] :] *= high
    return x


def shortcut(low: float = 1.0, high: float = 1.0) -> nn.Conv2d:
    """A 1x1 convolution whose weights answer to the two parts with ``low`` and ``high``."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner = nn.Conv2d(sum(SPLIT), 24, 1).requires_grad_(False)
    inner.weight[:, : SPLIT[0]] *= low
    inner.weight[:, SPLIT[0] :] *= high
    return inner


def output_mse(inner: nn.Module, x: Tensor, number_format: Format, split: tuple[int, ...]) -> float:
    layer = minmax_layer(inner, x, number_format, number_format, split)
    return float((layer(x) - inner(x)).square().mean())


@pytest.mark.parametrize("number_format", [int4, int8], ids=lambda f: f.name)
def test_split_beats_joint_where_the_halves_differ(number_format: Format) -> None:
    """A quiet half that the weights amplify: the loud half's step would drown it."""
    x, inner = halves(0.05, 5.0), shortcut(10.0, 0.1)
    assert output_mse(inner, x, number_format, SPLIT) < 0.5 * output_mse(inner, x, number_format, ())


@pytest.mark.parametrize("number_format", [int4, int8], ids=lambda f: f.name)
def test_split_beats_joint_with_equal_weights_too(number_format: Format) -> None:
    x, inner = halves(0.05, 5.0), shortcut()
    assert output_mse(inner, x, number_format, SPLIT) < output_mse(inner, x, number_format, ())


def test_the_quiet_half_is_seen_a_hundred_times_as_sharply() -> None:
    x = halves(0.05, 5.0)
    split, joint = (minmax_layer(shortcut(), x, int8, int8, parts) for parts in (SPLIT, ()))
    quiet = x[:, : SPLIT[0]]
    errors = [
        (seen - quiet).square().mean()
        for seen in (split.input_quantizers[0](quiet), joint.input_quantizers[0](x)[:, : SPLIT[0]])
    ]
    assert errors[0] * 100 < errors[1]


def test_equal_halves_lose_nothing() -> None:
    x, inner = halves(1.0, 1.0), shortcut()
    assert 0.75 < output_mse(inner, x, int8, SPLIT) / output_mse(inner, x, int8, ()) <= 1.0


@pytest.mark.parametrize("kind", ["conv", "conv 3x3", "linear"])
def test_two_halves_are_the_whole_in_full_precision(kind: str) -> None:
    make = {
        "conv": lambda: (nn.Conv2d(sum(SPLIT), 8, 1), halves(0.05, 5.0)),
        "conv 3x3": lambda: (nn.Conv2d(sum(SPLIT), 8, 3, padding=1), halves(0.05, 5.0)),
        "linear": lambda: (nn.Linear(sum(SPLIT), 8), halves(0.05, 5.0).permute(0, 2, 3, 1)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner, x = make[kind]()
    inner.requires_grad_(False)
    layer = QuantizedLayer(inner, None, None, SPLIT)
    assert relative(inner(x), layer(x)) <= 1e-5
    with full_precision(layer):
        assert torch.equal(layer(x), inner(x))


def test_the_bias_is_added_once() -> None:
    inner = nn.Conv2d(sum(SPLIT), 3, 1)
    nn.init.zeros_(inner.weight)
    nn.init.ones_(inner.bias)  # type: ignore[arg-type]
    layer = minmax_layer(inner, halves(1.0, 1.0), int8, int8, SPLIT)
    assert torch.all(layer(halves(1.0, 1.0)) == 1)


def test_each_half_has_its_own_grids() -> None:
    x, inner = halves(0.05, 5.0), shortcut(10.0, 0.1)
    layer = minmax_layer(inner, x, int8, uint8, SPLIT)
    assert len(layer.weight_quantizers) == len(layer.input_quantizers) == 2
    parts = zip(layer.weight_quantizers, inner.weight.split(SPLIT, dim=1), strict=True)
    for quantizer, weight in parts:
        absmax = weight.flatten(1).abs().amax(1)
        assert torch.allclose(quantizer.scale * 127, absmax)  # type: ignore[operator]
    small, large = (float(quantizer.scale) for quantizer in layer.input_quantizers)  # type: ignore[arg-type]
    assert large > 50 * small
