"""DGQ's own code (github.com/ugonfor/DGQ) on a U-Net of Stable Diffusion's kind, as its two scripts call it.

Its network is written for one size; here its blocks are put together in the size of ours.
"""

from __future__ import annotations

import logging
import tempfile
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.oracles.authors import Quantized, Rows, import_from, on_the_cpu, silent
from benchmarks.oracles.budget import Budget

GROUPS = 8  # of channels, tokens or columns of each activation


def quantize(
    checkout: Path, ours: nn.Module, rows: Rows, budget: Budget, quantized: set[str] | None
) -> Quantized:
    """The quantized network, with groups and scales for each of the calibrated timesteps.

    Args:
        checkout: folder of the repository.
        ours: the diffusers network, conditional.
        rows: what to calibrate on, as many rows of each timestep, those of a timestep together.
        budget: bits and steps.
        quantized: None: what the code itself quantizes.
    """
    assert quantized is None
    blocks, calibration, grouping, layer, model, losses = import_from(
        checkout, "diffusers_rewrite", "quant.calibration", "quant.calibration_group_quantization",
        "quant.quant_layer", "quant.quant_model", "quant.reconstruction_util",
    )  # fmt: skip
    logging.getLogger("quant").setLevel(logging.WARNING)
    t = rows[1]
    per_timestep = Counter(t.tolist())[float(t[0])]
    with (
        on_the_cpu(),
        tempfile.TemporaryDirectory() as folder,
        silent(),
    ):
        found = model.QuantModel(
            model=_network(blocks, ours),
            wq_params={"bits": budget.weight_bits, "channel_wise": True, "scaler": layer.Scaler.MSE},
            aq_params={
                "bits": budget.activation_bits, "channel_wise": False, "scaler": layer.Scaler.MINMAX,
                "leaf_param": True,
            },
            softmax_aq_params={
                "softmax_a_bit": budget.activation_bits, "t2i_log_quant": True, "t2i_real_time": True,
                "t2i_start_peak": True, "log_max_1": False,
            },
            aq_mode=[layer.QMODE.NORMAL.value, layer.QMODE.QDIFF.value],
            tib_recon=False,
        ).eval()  # fmt: skip
        calibration.cali_model(
            qnn=found, use_aq=False, path=f"{folder}/weights", running_stat=True, interval=per_timestep,
            tib_recon=False, w_cali_data=rows, a_cali_data=rows, iters=budget.rounding, batch_size=budget.batch,
            w=0.01, asym=True, warmup=0.2, opt_mode=losses.RLOSS.MSE, multi_gpu=False, no_recon=False, resume_w=None,
        )  # fmt: skip
        grouping.act_group_quant(
            "sd", found, rows, f"{folder}/activations", group_num=GROUPS, interval=per_timestep, group_mode="minmax",
        )  # fmt: skip
        kept = torch.load(f"{folder}/activations")
        kept["weight"] = torch.load(f"{folder}/weights_weight_only")["weight"]
    found.set_quant_state(use_wq=True, use_aq=True)
    found.disable_out_quantization()
    scales = {float(t[i * per_timestep]): kept[f"act_{i}"] for i in range(len(t) // per_timestep)}

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        result = torch.empty_like(x)
        for timestep in t.unique():
            own = t == timestep
            for name, value in scales[float(timestep)].items():
                path, _, kind = name.rpartition(".")
                getattr(found.get_submodule(path), kind).data = value
            (result[own],) = found(x[own], t[own], context[own])
        return result

    return Quantized(run, kept)


class _Network(nn.Module):
    """The order in which its network calls its blocks, for any number of them."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, sample: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """The prediction, alone in a list."""
        emb = self.time_embedding(self.time_proj(timesteps))
        sample = self.conv_in(sample)
        states = [sample]
        for block in self.down_blocks:
            attends = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
            sample, found = block(sample, temb=emb, **attends)
            states += found
        sample = self.mid_block(sample, emb, encoder_hidden_states=context)
        for block in self.up_blocks:
            attends = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
            count = len(block.resnets)
            states, own = states[:-count], states[-count:]
            sample = block(hidden_states=sample, temb=emb, res_hidden_states_tuple=own, **attends)
        return [self.conv_out(self.conv_act(self.conv_norm_out(sample)))]


def _network(blocks: ModuleType, ours: nn.Module) -> nn.Module:
    """Its blocks with the weights and in the places of ours.

    Args:
        blocks: the checkout's module ``diffusers_rewrite``.
        ours: a diffusers ``UNet2DConditionModel``.
    """
    config = ours.config
    time_width = ours.time_embedding.linear_1.out_features

    def resnet(own: nn.Module) -> nn.Module:
        made: nn.Module = blocks.ResnetBlock2D(
            own.in_channels, own.out_channels, conv_shortcut=own.conv_shortcut is not None
        )
        made.time_emb_proj = nn.Linear(time_width, own.out_channels)
        return made

    def transformer(own: nn.Module) -> nn.Module:
        width, heads = own.in_channels, own.transformer_blocks[0].attn1.heads
        made: nn.Module = blocks.Transformer2DModel(width, width, len(own.transformer_blocks))
        for block in made.transformer_blocks:
            block.attn1 = blocks.Attention(width, num_heads=heads)
            block.attn2 = blocks.Attention(width, config.cross_attention_dim, num_heads=heads)
        return made

    def block(own: nn.Module) -> nn.Module:
        kind = getattr(blocks, type(own).__name__)
        made: nn.Module = kind.__new__(kind)
        nn.Module.__init__(made)
        made.resnets = nn.ModuleList(resnet(each) for each in own.resnets)
        if hasattr(own, "attentions"):
            made.attentions = nn.ModuleList(transformer(each) for each in own.attentions)
        for name, sampler in (("downsamplers", blocks.Downsample2D), ("upsamplers", blocks.Upsample2D)):
            if hasattr(own, name):
                made_here = getattr(own, name)
                width = own.resnets[-1].out_channels
                setattr(made, name, made_here and nn.ModuleList([sampler(width, width)]))
        return made

    first = config.block_out_channels[0]
    network = _Network(
        config=Namespace(
            in_channels=config.in_channels, sample_size=config.sample_size, time_cond_proj_dim=None
        ),
        conv_in=nn.Conv2d(config.in_channels, first, 3, padding=1),
        time_proj=blocks.Timesteps(first),
        time_embedding=blocks.TimestepEmbedding(first, time_width),
        down_blocks=nn.ModuleList(block(each) for each in ours.down_blocks),
        mid_block=block(ours.mid_block),
        up_blocks=nn.ModuleList(block(each) for each in ours.up_blocks),
        conv_norm_out=nn.GroupNorm(config.norm_num_groups, first, eps=config.norm_eps),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(first, config.out_channels, 3, padding=1),
    )
    network.load_state_dict(ours.state_dict())
    return network.float().eval()
