"""Quantized attention: the products of a stock attention with quantized operands, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods import minmax
from qdeploy.network.current_timestep import CurrentTimestep
from qdeploy.quant import attention
from qdeploy.quant.attention import AttentionQuantizers, quantize_attention
from qdeploy.quant.modes import full_precision
from qdeploy.quant.operators import fake_quantize
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.state import quantizers
from qdeploy.recipe.formats import int8, integer, uint8, unsigned
from tests.helpers import MemoryRows, calibrating, relative, tiny_unet

attend = nn.functional.scaled_dot_product_attention


def operands(tokens: int = 6, keys: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, tokens, 4), (2, 3, keys, 4), (2, 3, keys, 4)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def ready(q: Tensor, k: Tensor, v: Tensor, bits: int = 8) -> AttentionQuantizers:
    quantizers = AttentionQuantizers(integer(bits), unsigned(bits))
    for name, x in (("query", q), ("key", k), ("value", v)):
        getattr(quantizers, name).set(*to_scale(x.min(), x.max(), integer(bits)))
    quantizers.probabilities.set(torch.tensor(1 / (2**bits - 1)), torch.tensor(0))
    return quantizers


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(1)},
    "additive mask": {"attn_mask": torch.linspace(-2, 2, 36).view(6, 6)},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_with_many_bits_it_is_stock_attention(options: dict[str, Any]) -> None:
    q, k, v = operands()
    assert relative(attend(q, k, v, **options), ready(q, k, v, bits=16).attend(q, k, v, **options)) < 1e-3


def test_with_switched_off_quantizers_it_is_stock_attention() -> None:
    q, k, v = operands(6, 9)
    quantizers = ready(q, k, v)
    for quantizer in quantizers.children():
        quantizer.enabled = False  # type: ignore[assignment]
    assert torch.allclose(quantizers.attend(q, k, v), attend(q, k, v), atol=1e-6)


@pytest.mark.parametrize("mask", [None, (6, 6), (2, 1, 6, 6), (2, 3, 6, 6)], ids=str)
def test_heads_one_by_one_are_all_heads_at_once(
    mask: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = operands()
    quantizers, calls = ready(q, k, v), []
    quantizers.probabilities.register_forward_hook(lambda module, args, output: calls.append(len(args)))
    options = (
        {} if mask is None else {"attn_mask": torch.randn(mask, generator=torch.Generator().manual_seed(1))}
    )
    with torch.no_grad():
        together = quantizers.attend(q, k, v, **options)
        monkeypatch.setattr(attention, "MOST_SCORES", 6 * 6)
        assert torch.allclose(quantizers.attend(q, k, v, **options), together, atol=1e-6)
    assert len(calls) == 1 + q.shape[1]
    quantizers.attend(q, k, v, **options)  # gradients may be wanted
    assert len(calls) == 2 + q.shape[1]


def test_q_k_v_and_the_softmax_output_are_quantized_and_the_scale_comes_after_the_product() -> None:
    """The order of Stable Diffusion's attention in Q-Diffusion's code, in plain arithmetic."""
    q, k, v = operands()
    quantizers = ready(q, k, v)
    q_hat, k_hat, v_hat = (fake_quantize(x, *to_scale(x.min(), x.max(), int8), -128, 127) for x in (q, k, v))
    p = (q_hat @ k_hat.transpose(-1, -2) / 2).softmax(-1)
    p_hat = (p * 255).round().clamp(0, 255) / 255
    assert torch.allclose(quantizers.attend(q, k, v), p_hat @ v_hat, atol=1e-5)
    assert not torch.allclose(p, p_hat, atol=1e-5)


def test_factors_of_groups_of_timesteps_come_after_the_products_which_are_of_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = operands()
    grouped, current = ready(q, k, v), CurrentTimestep()
    for quantizer in grouped.children():
        assert isinstance(quantizer, ActivationQuantizer)
        banks = torch.stack([quantizer.scale, 3 * quantizer.scale])
        quantizer.set(banks, torch.tensor(0), torch.tensor([500.0]))
        quantizer.current_timestep = current
    multiplied: list[tuple[Tensor, Tensor]] = []
    plain = Tensor.__matmul__

    def seen(a: Tensor, b: Tensor) -> Tensor:
        multiplied.append((a, b))
        return plain(a, b)

    for timestep, factor in ((10.0, 1.0), (900.0, 3.0)):
        single = ready(q, k, v)
        for quantizer in single.children():
            quantizer.scale = factor * quantizer.scale  # type: ignore[assignment, operator]
        with current.at(torch.tensor([timestep])), monkeypatch.context() as patch:
            patch.setattr(Tensor, "__matmul__", seen)
            found = grouped.attend(q, k, v)
        assert torch.allclose(found, single.attend(q, k, v), atol=1e-5)
    nominal = (grouped.query, grouped.key, grouped.probabilities, grouped.value)
    for quantizer, operand in zip(2 * nominal, (x for pair in multiplied for x in pair), strict=True):
        codes = operand / quantizer.scale.log().mean().exp()  # type: ignore[operator, union-attr]
        assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_probabilities_of_zero_and_one_are_codes_of_an_unsigned_grid(tmp_path: Path) -> None:
    """P7. QUEST-5: a sign bit that comes with the activations' format is lost on probabilities."""
    with calibrating(
        tiny_unet(), MemoryRows.noisy(), tmp_path / "out", coverage="qdiffusion-paper", activations="int8"
    ) as session:
        found = [module for module in session.denoiser.modules() if isinstance(module, AttentionQuantizers)]
    assert found
    for each in found:
        probabilities = each.probabilities
        assert isinstance(probabilities, ActivationQuantizer)
        assert (each.query.format.name, probabilities.format.name) == ("int8", "uint8")
        probabilities.set(*to_scale(torch.tensor(0.0), torch.tensor(1.0), probabilities.format))
        assert probabilities(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
        assert len(probabilities(torch.linspace(0, 1, 2000)).unique()) == 256


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fail = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fail:
            raise ZeroDivisionError
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_only_the_modules_own_calls_are_intercepted() -> None:
    q, k, v = operands()
    module, other = Attention(), Attention()
    quantizers = ready(q, k, v, bits=4)
    quantize_attention(module, quantizers)
    assert torch.equal(module(q, k, v), quantizers.attend(q, k, v))
    assert torch.equal(other(q, k, v), attend(q, k, v))
    assert not torch.equal(module(q, k, v), other(q, k, v))
    with full_precision(module):
        assert torch.equal(module(q, k, v), other(q, k, v))


def test_a_failing_call_ends_the_interception() -> None:
    q, k, v = operands()
    module = Attention()
    quantize_attention(module, ready(q, k, v, bits=4))
    module.fail = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            module(q, k, v)
    assert torch.equal(Attention()(q, k, v), attend(q, k, v))
    module.fail = False
    assert not torch.equal(module(q, k, v), attend(q, k, v))


def test_in_a_network_every_operand_gets_its_range(tmp_path: Path) -> None:
    """QD-7: the released running statistics skip the operands of attention products."""
    with calibrating(
        tiny_unet(), MemoryRows.noisy(), tmp_path / "out", coverage="qdiffusion-paper"
    ) as session:
        minmax.WeightRanges().run(session)
        minmax.ActivationRanges().run(session)
        found = dict(quantizers(session.denoiser))
        assert session.structure.attentions
        for path in session.structure.attentions:
            for name in ("query", "key", "value", "probabilities"):
                quantizer = found[f"{path}.attention.{name}"]
                assert float(quantizer.scale) != 1
                assert (quantizer.format == uint8) == (name == "probabilities")
            softmax = found[f"{path}.attention.probabilities"]
            assert softmax.zero_point == 0
            assert 0 < float(softmax.scale) <= 1 / 255 * (1 + 1e-6)
