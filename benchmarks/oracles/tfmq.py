"""TFMQ-DM's own code (github.com/ModelTC/TFMQ-DM) on DDIM's U-Net, as its CIFAR-10 script calls it."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.oracles.authors import Quantized, Rows, import_from, leave_attention, network_with, on_the_cpu
from benchmarks.oracles.budget import Budget


def quantize(
    checkout: Path, ours: nn.Module, rows: Rows, budget: Budget, quantized: set[str] | None
) -> Quantized:
    """The quantized network, with activation scales for each of the calibrated timesteps.

    Args:
        checkout: folder of the repository.
        ours: the diffusers network.
        rows: calibration inputs, as many of each timestep, those of a timestep together, and their timesteps.
        budget: bits and steps.
        quantized: diffusers paths of the layers that are quantized, without attention's products; None for what the
            code itself quantizes.
    """
    x, t = rows
    names = ("quant_model", "quant_layer", "quant_block", "calibration", "reconstruction_util")
    diffusion, model, layer, block, calibration, losses = import_from(
        checkout, "ddim.models.diffusion", *(f"quant.{name}" for name in names), beside=("stable-diffusion",)
    )
    logging.getLogger("quant").setLevel(logging.WARNING)
    network = network_with(diffusion, ours, quantized)
    weights = {"bits": budget.weight_bits, "channel_wise": True, "scaler": layer.Scaler.MSE}
    activations = {
        "bits": budget.activation_bits, "channel_wise": False, "scaler": layer.Scaler.MSE, "leaf_param": True
    }  # fmt: skip
    modes = [layer.QMODE.NORMAL.value, layer.QMODE.QDIFF.value]
    tables: list[dict[str, Tensor]] = []
    per_timestep = len(x) // len(t.unique())
    with on_the_cpu():
        found = model.QuantModel(
            model=network, wq_params=weights, aq_params=activations, softmax_a_bit=8, aq_mode=modes
        ).eval()
        if quantized is not None:
            leave_attention(found, block.QuantAttnBlock, "aqtizer")
        # A copy, as a file is: these are the tensors of its network, which `run` loads the next scales into.
        with patch.object(torch, "save", lambda made, path: tables.append(deepcopy(made))):
            calibration.cali_model(
                qnn=found, use_aq=True, path="kept", running_stat=True, interval=per_timestep, w_cali_data=(x, t),
                a_cali_data=(x, t), iters=budget.rounding, batch_size=budget.batch, w=0.01, asym=True, warmup=0.2,
                opt_mode=losses.RLOSS.MSE, multi_gpu=False,
            )  # fmt: skip
        found.set_quant_state(use_wq=True, use_aq=True)
        found.eval()
    (kept,) = tables
    scales = {float(t[i * per_timestep]): kept[f"act_{i}"] for i in range(len(t) // per_timestep)}

    def run(x: Tensor, t: Tensor) -> Tensor:
        result = torch.empty_like(x)
        for timestep in t.unique():
            own = t == timestep
            found.load_state_dict(scales[float(timestep)], strict=False)
            result[own] = found(x[own], t[own])
        return result

    return Quantized(run, kept)
