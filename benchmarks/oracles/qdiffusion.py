"""Q-Diffusion's own code (github.com/Xiuyu-Li/q-diffusion) on DDIM's U-Net, in the order of its CIFAR-10 script."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from benchmarks.oracles.authors import (
    Quantized,
    Rows,
    import_from,
    leave_attention,
    network_with,
    on_the_cpu,
    reconstruct,
)
from benchmarks.oracles.budget import Budget


def quantize(
    checkout: Path, ours: nn.Module, rows: Rows, budget: Budget, quantized: set[str] | None
) -> Quantized:
    """The network quantized by the authors' code.

    Args:
        checkout: folder of the repository.
        ours: the diffusers network.
        rows: calibration inputs and their timesteps.
        budget: bits and steps.
        quantized: diffusers paths of the layers that are quantized, without attention's products; None for what the
            code itself quantizes.
    """
    x, t = rows
    names = ("quant_model", "quant_layer", "quant_block", "block_recon", "layer_recon")
    diffusion, model, layer, block, block_recon, layer_recon = import_from(
        checkout, "ddim.models.diffusion", *(f"qdiff.{name}" for name in names)
    )
    logging.getLogger("qdiff").setLevel(logging.WARNING)
    network = network_with(diffusion, ours, quantized)
    weights = {"n_bits": budget.weight_bits, "channel_wise": True, "scale_method": "max"}
    activations = {
        "n_bits": budget.activation_bits, "symmetric": False, "channel_wise": False, "scale_method": "max",
        "leaf_param": True,
    }  # fmt: skip
    with on_the_cpu():
        found = model.QuantModel(
            model=network, weight_quant_params=weights, act_quant_params=activations, sm_abit=8
        ).eval()
        if quantized is not None:
            leave_attention(found, block.QuantAttnBlock, "act_quantizer")
        found.set_quant_state(True, False)
        with torch.no_grad():
            found(x[:8], t[:8])

        learners = {
            layer.QuantModule: layer_recon.layer_reconstruction,
            block.BaseQuantBlock: block_recon.block_reconstruction,
        }

        data = (x, t)
        reconstruct(
            found, found, learners,
            cali_data=data, batch_size=budget.batch, iters=budget.rounding, weight=0.01, asym=True,
            b_range=(20, 2), warmup=0.2, act_quant=False, opt_mode="mse",
        )  # fmt: skip
        found.set_quant_state(True, True)
        chosen = torch.randperm(len(x))
        with torch.no_grad():
            found(x[chosen[:64]], t[chosen[:64]])
            found.set_running_stat(True)
            for part in chosen.split(64):
                found(x[part], t[part])
            found.set_running_stat(False)
        reconstruct(
            found, found, learners,
            cali_data=data, batch_size=budget.batch, iters=budget.scales, act_quant=True, opt_mode="mse",
            lr=4e-4, p=2.4,
        )  # fmt: skip
        found.set_quant_state(True, True)
        found.eval()
    saved = dict(found.state_dict())
    for name, module in found.named_modules():
        # The script makes parameters of these, so that they are saved.
        if (
            type(module).__name__ in ("AdaRoundQuantizer", "UniformAffineQuantizer")
            and module.zero_point is not None
        ):
            saved[f"{name}.delta"] = torch.as_tensor(module.delta).detach()
            saved[f"{name}.zero_point"] = torch.as_tensor(module.zero_point).float()
    return Quantized(lambda x, t: found(x, t), saved)
