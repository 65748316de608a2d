"""DGQ's attention: softmax outputs on a logarithmic scale, and the start token apart.

Traps are those of the released code; each test fails when its trap is put back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdeploy.calibrate.methods.dgq_attention import crosses
from qdeploy.model.folder import open_model
from qdeploy.model.inputs import example_inputs
from qdeploy.network.roles import find_structure
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.log_attention import LogQuantizer, log_quantize, split_start
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import int8, uint8
from tests.models import stable_diffusion_folder


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_logarithmic_codes_are_within_half_a_step(bits: int) -> None:
    """P18, DGQ-7: dequantization is 2^-q."""
    largest = torch.tensor(0.7)
    a = torch.cat(
        [largest * torch.exp2(-torch.linspace(0, 2**bits - 1.51, 2000, dtype=torch.float64)).float()]
    )[None]
    a = a[a > 1e-36][None]
    ratio = log_quantize(a, bits) / a
    assert ((ratio >= 2**-0.501) & (ratio <= 2**0.501)).all()
    powers = torch.exp2(-torch.arange(0.0, min(2**bits - 1, 100)))[None]
    assert torch.equal(log_quantize(powers, bits), powers)


def test_what_is_too_small_for_a_code_is_zero() -> None:
    """DGQ-6, P7: at four bits the code's smallest step gives thousands of keys 2^-15 of the largest."""
    a = torch.full((1, 1, 1, 4096), 1e-9)
    a[..., 0] = 1.0
    quantized = log_quantize(a, 4)
    assert quantized[..., 0] == 1.0
    assert quantized.sum() == 1.0
    assert torch.equal(log_quantize(torch.zeros(2, 1, 3, 3), 4), torch.zeros(2, 1, 3, 3))


def test_the_largest_probability_is_the_samples_own() -> None:
    """DGQ-5, P18: the code takes that of the batch, so images depend on each other."""
    a = torch.rand(3, 2, 4, 5, generator=seeded())
    a[1] *= 0.1
    alone = log_quantize(a[1:2], 8)
    assert torch.equal(log_quantize(a, 8)[1:2], alone)
    assert float(alone.max()) == float(a[1].max())


def test_the_start_token_on_its_own_is_the_same_product() -> None:
    """P19."""
    a = torch.randn(2, 3, 7, 9, generator=seeded()).softmax(-1)
    v = torch.randn(2, 3, 9, 4, generator=seeded())
    assert torch.allclose(split_start(a, v), a @ v, atol=1e-6)


def test_the_start_token_bypasses_quantization() -> None:
    q, k, v = (torch.randn(2, 2, 5, 4, generator=seeded()) for _ in range(3))
    k[..., 0, :] *= 30
    quantizers = AttentionQuantizers(int8, uint8)
    quantizers.probabilities = LogQuantizer(8, start=True)
    for quantizer, x in ((quantizers.query, q), (quantizers.key, k[..., 1:, :]), (quantizers.value, v)):
        quantizer.set(*to_scale(x.min(), x.max(), int8))
    seen: list[Tensor] = []
    quantizers.key.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    quantizers.attend(q, k, v)
    assert torch.equal(seen[0], k[..., 1:, :])
    a = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    assert torch.equal(quantizers.probabilities(a)[..., 0], a[..., 0])
    assert torch.equal(quantizers.probabilities(a)[..., 1:], log_quantize(a[..., 1:], 8))
    quantizers.probabilities.enabled = False
    assert torch.equal(quantizers.probabilities(a), a)


def test_cross_attention_is_told_by_what_it_reads(tmp_path: Path) -> None:
    model = open_model(stable_diffusion_folder(tmp_path / "model"))
    structure = find_structure(model.load(), example_inputs(model, rows=1))
    assert structure.attentions
    for path in structure.attentions:
        assert crosses(structure.layers, path) == path.endswith("attn2")
    assert all(structure.products[path] > 0 for path in structure.attentions)
