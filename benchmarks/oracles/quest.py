"""QuEST's own code (github.com/hatchetProject/QuEST) on LDM's U-Net, in the order of its text-to-image script.

Activation ranges come from rows of each timestep, as in its class-conditional script; the text-to-image script copies
those of one batch to all timesteps. How often its loops of tuning run is written into them; here that is scaled, so
that each of its two alignments sees as many rows as ours.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

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

EPOCHS_OF_TIME = (200, 50, 400)  # for the first timestep, those above 300, and the others; two rows an epoch
EPOCHS = 20  # of up to 64 rows of every timestep


def quantize(
    checkout: Path, ours: nn.Module, rows: Rows, budget: Budget, quantized: set[str] | None
) -> Quantized:
    """The quantized network, with activation scales for each of the calibrated timesteps.

    Args:
        checkout: folder of the repository.
        ours: the diffusers network, conditional.
        rows: what to calibrate on, as many rows of each timestep, those of a timestep together.
        budget: bits and steps.
        quantized: None: what the code itself quantizes.
    """
    assert quantized is None
    names = ("quant_model", "quant_layer", "quant_block", "block_recon", "layer_recon", "post_layer_recon_sd")
    unet, model, layer, block, block_recon, layer_recon, tuning = import_from(
        checkout, "ldm.modules.diffusionmodules.openaimodel", *(f"qdiff.{name}" for name in names)
    )
    for each in ("qdiff", "ldm"):
        logging.getLogger(each).setLevel(logging.WARNING)
    x, t, context = rows[0], rows[1].long(), rows[2]
    timesteps = [int(timestep) for timestep in t.unique().flip(0)]
    weights = {"n_bits": budget.weight_bits, "channel_wise": True, "scale_method": "mse"}
    activations = {
        "n_bits": budget.activation_bits, "channel_wise": False, "scale_method": "mse", "leaf_param": True
    }  # fmt: skip
    with on_the_cpu(), contiguous_convolutions(), tempfile.TemporaryDirectory() as folder, chdir(folder):
        found = model.QuantModel(
            model=ldm_network(unet, ours), weight_quant_params=weights, act_quant_params=activations, sm_abit=8,
            timewise=True, list_timesteps=timesteps,
        ).eval()  # fmt: skip
        found.set_grad_ckpt(False)
        found.set_quant_state(True, False)
        found.set_timestep(timesteps[0])
        with torch.no_grad():
            found(x[:4], t[:4], context[:4])

        learners = {
            layer.QuantModule: layer_recon.layer_reconstruction,
            block.BaseQuantBlock: block_recon.block_reconstruction,
        }

        reconstruct(
            found, found, learners,
            cali_data=(x, t, context), batch_size=budget.batch, iters=budget.rounding, weight=0.01, asym=True,
            b_range=(20, 2), warmup=0.2, act_quant=False, opt_mode="mse", cond=True, outpath=".",
        )  # fmt: skip
        found.set_quant_state(True, True)
        found.eval()
        with torch.no_grad():
            for timestep in timesteps:
                own = (t == timestep).nonzero().flatten()[:64]
                found.set_timestep(timestep)
                found(x[own], t[own], context[own])
        found.save_dict_params()
        _tune(tuning, found, (x, t, context), timesteps, budget)
        found.set_quant_state(True, True)
        found.eval()
        saved = _as_saved(found, layer)

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        result = torch.empty_like(x)
        for timestep in t.unique():
            own = t == timestep
            found.set_timestep(int(timestep))
            result[own] = found(x[own], t[own].long(), context[own])
        return result

    return Quantized(run, saved)


def _tune(code: ModuleType, found: nn.Module, rows: Rows, timesteps: list[int], budget: Budget) -> None:
    """Both of its alignments, with so many epochs that each sees ``budget.tuning`` batches."""
    files = max(1, min(64, Counter(rows[1].tolist())[timesteps[0]]) // 4)
    of_time = sum(EPOCHS_OF_TIME[0 if t == timesteps[0] else 1 if t > 300 else 2] for t in timesteps)
    wanted = budget.tuning * budget.batch
    share_of_time = wanted / (2 * of_time)
    share = wanted / (4 * files * EPOCHS * len(timesteps))
    epochs = {count: max(1, round(count * share_of_time)) for count in EPOCHS_OF_TIME}
    epochs[EPOCHS] = max(1, round(EPOCHS * share))

    def fewer(count: int) -> range:
        return range(epochs.get(count, count))

    with (
        patch.object(code, "range", fewer, create=True),
        patch.object(code, "trange", lambda count: range(min(count, files))),
        patch.object(torch.cuda, "empty_cache", lambda: None),
        silent(),
    ):
        for tune in (code.pd_optimize_timeembed, code.pd_optimize_timewise):
            tune(found, rows, None, None, logging.getLogger("qdiff"), timesteps=timesteps, outpath=".")


def _as_saved(found: nn.Module, layer: ModuleType) -> dict[str, Tensor]:
    """The state as its script writes it: scales and zero points are parameters there."""
    found.save_dict_params()
    saved = dict(found.state_dict())
    for name, module in found.named_modules():
        if type(module).__name__ == "AdaRoundQuantizer":
            saved[f"{name}.delta"] = torch.as_tensor(module.delta).detach()
            saved[f"{name}.zero_point"] = torch.as_tensor(module.zero_point).float()
        elif isinstance(module, layer.TimewiseUniformQuantizer) and module.zero_point_list is not None:
            saved[f"{name}.delta_list"] = module.delta_list.detach()
            saved[f"{name}.zero_point_list"] = module.zero_point_list.float()
    return saved
