"""Switches act on our own quantizers, and on no other module that has an attribute of the same name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from torch import nn

from qdeploy.quant.layer import QuantizedLayer, quantized_layers, replace_module
from qdeploy.quant.modes import full_precision, weights_only
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.recipe.formats import int8

Mode = Callable[[nn.Module], AbstractContextManager[None]]


class Grounded(nn.Module):
    """A layer in front of GLIGEN's gated attention, whose own switch is called ``enabled``."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.fuser = GatedSelfAttentionDense(query_dim=8, context_dim=6, n_heads=2, d_head=4)
        with torch.no_grad():
            self.fuser.alpha_attn.fill_(1.0)
            self.fuser.alpha_dense.fill_(1.0)

    def forward(self, x: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.fuser(self.project(x), objects)
        return gated


@pytest.fixture
def grounded() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Grounded().eval().requires_grad_(False), (torch.randn(2, 5, 8), torch.randn(2, 3, 6))


@pytest.mark.parametrize("mode", [weights_only, full_precision])
def test_gligen_s_gated_attention_is_untouched(
    grounded: tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]], mode: Mode
) -> None:
    network, inputs = grounded
    expected = network(*inputs)
    network.fuser.enabled = False
    assert not torch.equal(network(*inputs), expected), "the test's network does not use its fuser"
    network.fuser.enabled = True
    with mode(network):
        assert torch.equal(network(*inputs), expected)
        assert network.fuser.enabled is True


@pytest.mark.parametrize("mode", [weights_only, full_precision])
def test_switches_come_back_as_they_were(
    grounded: tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]], mode: Mode
) -> None:
    network, _ = grounded
    for path in ("project", "fuser.linear"):
        replace_module(network, path, QuantizedLayer(network.get_submodule(path), int8, int8))
    layers = quantized_layers(network)
    layers["project"].quantized = False
    layers["fuser.linear"].activation_quantizers[0].enabled = False

    def switches() -> list[bool]:
        own = [m for m in network.modules() if isinstance(m, ActivationQuantizer)]
        return [layer.quantized for layer in layers.values()] + [quantizer.enabled for quantizer in own]

    before = switches()
    with mode(network):
        assert sum(switches()) < sum(before)
    assert switches() == before
