"""Q-Diffusion's code on a network of diffusers, as its script for CIFAR-10 calls it.

Weights by channel with a zero point, AdaRound by blocks with inputs from the quantized network, then activations:
scales from 64 rows, and, if asked for, learned. The layers that are quantized are those of one of our coverages, so
that what is compared is the method and not how much of the network it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.network.roles import Layer
from qdeploy.quant.layer import replace_module

BLOCKS = ("ResnetBlock2D", "Attention")  # of diffusers, that are reconstructed as a whole


@dataclass(frozen=True)
class Settings:
    """What their script takes on its command line.

    Attributes:
        weight_bits: of the weights.
        act_bits: of the activations.
        iterations: of AdaRound for each block.
        act_iterations: of learned activation scales for each block; 0 leaves the first ones.
        batch: rows of an iteration.
        finder: ``max``, or ``mse`` for their search.
        running: let the first ranges run over all rows (``--running_stat``).
    """

    weight_bits: int = 4
    act_bits: int = 8
    iterations: int = 300
    act_iterations: int = 60
    batch: int = 16
    finder: str = "max"
    running: bool = False


class Called(nn.Module):
    """A denoiser as their functions call one: sample, timestep, context."""

    def __init__(self, denoiser: nn.Module, kinds: tuple[type, ...]) -> None:
        super().__init__()
        self.denoiser, self.kinds = denoiser, kinds

    def forward(self, x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
        """The prediction."""
        result: Tensor = self.denoiser(x, timesteps, return_dict=False)[0]
        return result

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        """Switch all of their modules."""
        for module in self.denoiser.modules():
            if isinstance(module, self.kinds):
                module.set_quant_state(weight_quant, act_quant)


def quantize(
    denoiser: nn.Module,
    layers: Sequence[Layer],
    samples: Tensor,
    timesteps: Tensor,
    qdiff: SimpleNamespace,
    settings: Settings,
    seed: int = 0,
) -> Callable[[bool], nn.Module]:
    """Quantize a denoiser in place by their code.

    Args:
        denoiser: called with a sample and a timestep alone.
        layers: what is quantized.
        samples: [N, ...] inputs of the calibration rows.
        timesteps: [N] of them.
        qdiff: their modules, of `benchmarks.oracles.checkout.reference`.
        settings: of their script.
        seed: of torch's global generator, which their code draws from.

    Returns:
        Gives the denoiser with its activations quantized, or, for False, with its weights alone.
    """
    torch.manual_seed(seed)
    weights = {"n_bits": settings.weight_bits, "channel_wise": True, "scale_method": settings.finder}
    activations = {
        "n_bits": settings.act_bits,
        "symmetric": False,
        "channel_wise": False,
        "scale_method": settings.finder,
        "leaf_param": True,
    }
    for layer in layers:
        module = qdiff.quant_layer.QuantModule(denoiser.get_submodule(layer.path), weights, activations)
        if layer.split:
            module.split = layer.split[0]
            module.set_split()
        replace_module(denoiser, layer.path, module)
    base = qdiff.quant_block.BaseQuantBlock
    _wrap_blocks(denoiser, qdiff.quant_layer.QuantModule, base, activations)
    model = Called(denoiser, (qdiff.quant_layer.QuantModule, base))
    data = (samples, timesteps)
    model.set_quant_state(True, False)
    with torch.no_grad():
        model(samples[:8], timesteps[:8])
    rounding = {"batch_size": settings.batch, "iters": settings.iterations, "weight": 0.01, "asym": True}
    _reconstruct(
        model, denoiser, qdiff, data, {**rounding, "b_range": (20, 2), "warmup": 0.2, "act_quant": False}
    )
    model.set_quant_state(True, True)
    with torch.no_grad():
        chosen = torch.randperm(len(samples))[:64]
        model(samples[chosen], timesteps[chosen])
        if settings.running:
            _run_ranges(model, denoiser, qdiff, data)
    if settings.act_iterations:
        scales = {"batch_size": settings.batch, "iters": settings.act_iterations, "act_quant": True}
        _reconstruct(model, denoiser, qdiff, data, {**scales, "lr": 4e-4, "p": 2.4})

    def switched(act_quant: bool) -> nn.Module:
        model.set_quant_state(True, act_quant)
        return denoiser.eval()

    return switched


def _wrap_blocks(module: nn.Module, layer: type, base: type, activations: dict[str, Any]) -> None:
    """Make what is reconstructed as a whole one of their blocks."""

    class Block(base):  # type: ignore[misc, valid-type]
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(activations)
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    for name, child in module.named_children():
        if type(child).__name__ in BLOCKS and any(isinstance(each, layer) for each in child.modules()):
            setattr(module, name, Block(child))
        else:
            _wrap_blocks(child, layer, base, activations)


def _reconstruct(
    model: Called,
    module: nn.Module,
    qdiff: SimpleNamespace,
    data: tuple[Tensor, Tensor],
    options: dict[str, Any],
) -> None:
    """Their walk: blocks as a whole, layers outside of blocks by themselves."""
    for child in module.children():
        if isinstance(child, qdiff.quant_layer.QuantModule):
            qdiff.layer_recon.layer_reconstruction(model, child, cali_data=data, **options)
        elif isinstance(child, qdiff.quant_block.BaseQuantBlock):
            qdiff.block_recon.block_reconstruction(model, child, cali_data=data, **options)
        else:
            _reconstruct(model, child, qdiff, data, options)


def _run_ranges(
    model: Called, denoiser: nn.Module, qdiff: SimpleNamespace, data: tuple[Tensor, Tensor]
) -> None:
    quantized = [each for each in denoiser.modules() if isinstance(each, qdiff.quant_layer.QuantModule)]
    for running in (True, False):
        for layer in quantized:
            layer.set_running_stat(running)
        if running:
            for samples, timesteps in zip(*(tensor.split(64) for tensor in data), strict=True):
                model(samples, timesteps)
