"""QNCD's own code (github.com/huanpengchu/QNCD) on LDM's U-Net, in the order of its text-to-image script.

Its quantizers lie in the folder ``quant`` and import each other as ``qdiff``; under that name they run. Smoothing by
the embedding is on, as in the command of its README, and so are asymmetric grids and float transformer blocks. Its
script leaves the input of the last layer in float; here it is quantized, as in ours. Its correction of the sampler's
noise is not measured here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.oracles.authors import (
    Quantized,
    Rows,
    contiguous_convolutions,
    import_from,
    ldm_network,
    on_the_cpu,
    reconstruct,
    silent,
)
from benchmarks.oracles.budget import Budget


def quantize(
    checkout: Path, ours: nn.Module, rows: Rows, budget: Budget, quantized: set[str] | None
) -> Quantized:
    """The network quantized by the authors' code.

    Args:
        checkout: folder of the repository.
        ours: the diffusers network, conditional.
        rows: what to calibrate on.
        budget: bits and steps; roundings are learned with fewer than eight bits only.
        quantized: None: what the code itself quantizes.
    """
    assert quantized is None
    names = ("quant_model", "quant_layer", "quant_block", "block_recon", "layer_recon")
    unet, model, layer, block, block_recon, layer_recon = import_from(
        checkout, "ldm.modules.diffusionmodules.openaimodel", *(f"qdiff.{name}" for name in names),
        named={"qdiff": "quant"},
    )  # fmt: skip
    for each in ("qdiff", "ldm"):
        logging.getLogger(each).setLevel(logging.WARNING)
    weights = {"n_bits": budget.weight_bits, "channel_wise": True, "scale_method": "max"}
    activations = {
        "n_bits": budget.activation_bits, "channel_wise": False, "scale_method": "mse", "leaf_param": True
    }  # fmt: skip
    with (
        on_the_cpu(),
        contiguous_convolutions(),
        silent(),
    ):
        found = model.QuantModel(
            model=ldm_network(unet, ours), weight_quant_params=weights, act_quant_params=activations, sm_abit=8
        ).eval()  # fmt: skip
        found.set_grad_ckpt(False)
        smoothed = [each for each in found.modules() if hasattr(each, "scale_split_static")]

        def state(weight: bool, activation: bool) -> None:
            """Quantize, but the transformer blocks."""
            found.set_quant_state(weight, activation)
            for each in found.modules():
                if isinstance(each, block.QuantBasicTransformerBlock):
                    each.set_quant_state(False, False)
                    each.ignore_reconstruction = True

        found.set_quant_state(False, False)
        for each in smoothed:
            each.scale_split_static = each.scale_getting = True
        with torch.no_grad():
            for part in torch.randperm(len(rows[0])).split(2):
                found(*(value[part] for value in rows))
        for each in smoothed:
            each.scale_getting = False
            each.set_conv_weight()
        found.set_quant_state(True, False)
        with torch.no_grad():
            found(*(value[:2] for value in rows))
        state(True, False)

        def learn_block(network: nn.Module, child: nn.Module, **how: object) -> None:
            if not child.ignore_reconstruction:
                block_recon.block_reconstruction(network, child, **how)

        learners = {
            layer.QuantModule: layer_recon.layer_reconstruction,
            block.BaseQuantBlock: learn_block,
        }

        if budget.weight_bits == 4:
            reconstruct(
                found, found, learners,
                cali_data=rows, batch_size=budget.batch, iters=budget.rounding, weight=0.01, asym=True,
                b_range=(20, 2), warmup=0.2, act_quant=False, opt_mode="mse", cond=True, skip=False,
            )  # fmt: skip
        state(True, True)
        found.eval()
        with torch.no_grad():
            shuffled = torch.randperm(len(rows[0]))
            found(*(value[shuffled[: budget.batch]] for value in rows))
            found.set_running_stat(True)
            for part in shuffled.split(budget.batch):
                found(*(value[part] for value in rows))
            found.set_running_stat(False)

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return found(x, t, context)  # type: ignore[no-any-return]

    return Quantized(run, dict(found.state_dict()))
