"""Where the layers of CompVis' and DDIM's U-Nets are in diffusers' networks.

``input_blocks``, ``middle_block`` and ``output_blocks`` (Stable Diffusion, LDM, ADM) number blocks in the order of
execution; ``down``, ``mid`` and ``up`` (DDIM's code for CIFAR-10) by resolution, the highest first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
    "conv": "conv",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_DDIM_INNER = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


# Blocks of DDIM's code by resolution; ``{up}`` counts from the other end.
_DDIM = {
    r"mid\.block_1": "mid_block.resnets.0",
    r"mid\.block_2": "mid_block.resnets.1",
    r"mid\.attn_1": "mid_block.attentions.0",
    r"down\.(\d+)\.block\.(\d+)": "down_blocks.{down}.resnets.{layer}",
    r"down\.(\d+)\.attn\.(\d+)": "down_blocks.{down}.attentions.{layer}",
    r"down\.(\d+)\.downsample": "down_blocks.{down}.downsamplers.0",
    r"up\.(\d+)\.block\.(\d+)": "up_blocks.{up}.resnets.{layer}",
    r"up\.(\d+)\.attn\.(\d+)": "up_blocks.{up}.attentions.{layer}",
    r"up\.(\d+)\.upsample": "up_blocks.{up}.upsamplers.0",
}
_DDIM_OUTSIDE = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
}


@dataclass(frozen=True)
class Place:
    """A layer of a diffusers network.

    Attributes:
        path: its path.
        rows: output channels of the other network's layer that are its own; None for all.
    """

    path: str
    rows: Tensor | None = None


def diffusers_paths(names: Iterable[str], denoiser: nn.Module) -> dict[str, list[Place]]:
    """Places of layers in a diffusers U-Net, for names as CompVis, DDIM or diffusers has them.

    Args:
        names: paths of layers; those that are not known have no place.
        denoiser: the diffusers network, with its configuration.
    """
    listed, own = list(names), dict(denoiser.named_modules())
    if any(name.startswith(("input_blocks.", "middle_block.")) for name in listed):
        blocks = _blocks(denoiser)
        found = {name: _compvis(name, blocks, own) for name in listed}
    elif any(re.match(r"(down|up)\.\d+\.", name) for name in listed):
        last = len(denoiser.get_submodule("up_blocks")._modules) - 1
        found = {name: _ddim(name, last) for name in listed}
    else:
        found = {name: [Place(name)] for name in listed}
    return {name: [place for place in places if place.path in own] for name, places in found.items()}


def _blocks(denoiser: Any) -> dict[str, str]:
    """Where each block of CompVis' U-Net is in diffusers', by path: numbers count executions."""
    found = {f"middle_block.{2 * number}": f"mid_block.resnets.{number}" for number in (0, 1)}
    found["middle_block.1"] = "mid_block.attentions.0"
    number = 1
    for level, block in enumerate(denoiser.down_blocks):
        attends = bool(getattr(block, "attentions", None))
        for layer in range(len(block.resnets)):
            found[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if attends:
                found[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if block.downsamplers:
            found[f"input_blocks.{number}.0"] = f"down_blocks.{level}.downsamplers.0"
            number += 1
    number = 0
    for level, block in enumerate(denoiser.up_blocks):
        attends = bool(getattr(block, "attentions", None))
        for layer in range(len(block.resnets)):
            found[f"output_blocks.{number}.0"] = f"up_blocks.{level}.resnets.{layer}"
            if attends:
                found[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{layer}"
            if block.upsamplers and layer == len(block.resnets) - 1:
                found[f"output_blocks.{number}.{1 + attends}"] = f"up_blocks.{level}.upsamplers.0"
            number += 1
    return found


def _compvis(name: str, blocks: dict[str, str], own: dict[str, nn.Module]) -> list[Place]:
    if name in _OUTSIDE:
        return [Place(_OUTSIDE[name])]
    parts = name.split(".")
    for length in (3, 2):
        path, rest = blocks.get(".".join(parts[:length])), ".".join(parts[length:])
        if path is None:
            continue
        if rest == "qkv":
            return _of_heads(path, own)
        attention = {"proj_out": "to_out.0", "norm": "group_norm"}.get(rest, rest)
        if attention != rest and f"{path}.{attention}" in own:
            return [Place(f"{path}.{attention}")]
        return [Place(f"{path}.{_RESNET.get(rest, rest)}")]
    return []


def _of_heads(path: str, own: dict[str, nn.Module]) -> list[Place]:
    """Queries, keys and values of one convolution, whose channels go head by head, three parts of each."""
    attention: Any = own.get(path)
    if attention is None or not hasattr(attention, "to_q"):
        return []
    channels = attention.to_q.weight.shape[0]
    rows = torch.arange(3 * channels).view(attention.heads, 3, -1)
    return [Place(f"{path}.to_{letter}", rows[:, part].flatten()) for part, letter in enumerate("qkv")]


def _ddim(name: str, last: int) -> list[Place]:
    if name in _DDIM_OUTSIDE:
        return [Place(_DDIM_OUTSIDE[name])]
    block, _, inner = name.rpartition(".")
    for pattern, place in _DDIM.items():
        if (match := re.fullmatch(pattern, block)) is not None:
            numbers = [int(number) for number in match.groups()] or [0]
            known = {"down": numbers[0], "up": last - numbers[0], "layer": numbers[-1]}
            return [Place(f"{place.format(**known)}.{_DDIM_INNER.get(inner, inner)}")]
    return []
