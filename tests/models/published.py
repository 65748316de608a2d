"""Files in the layouts that the code of the papers writes: an independent writer, in numpy, of the layouts' facts.

It shares nothing with the reader: names come from hand-written tables for the tiny networks of `tests.models`, and
the codes that a file stands for are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]

# The blocks of `ddpm_folder` and `stable_diffusion_folder` with channels (8, 16) and one layer per block.
COMPVIS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0": "input_blocks.2.0",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_out": "out.2",
}
COMPVIS_INNER = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "to_out.0": "proj_out",
}
DDIM = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_in": "conv_in",
    "down_blocks.0.resnets.0": "down.0.block.0",
    "down_blocks.0.downsamplers.0": "down.0.downsample",
    "down_blocks.1.resnets.0": "down.1.block.0",
    "down_blocks.1.attentions.0": "down.1.attn.0",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "up_blocks.0.resnets.0": "up.1.block.0",
    "up_blocks.0.attentions.0": "up.1.attn.0",
    "up_blocks.0.resnets.1": "up.1.block.1",
    "up_blocks.0.attentions.1": "up.1.attn.1",
    "up_blocks.0.upsamplers.0": "up.1.upsample",
    "up_blocks.1.resnets.0": "up.0.block.0",
    "up_blocks.1.resnets.1": "up.0.block.1",
    "conv_out": "conv_out",
}
DDIM_INNER = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# Channels of the first half of what the shortcuts of the way up read.
HALVES = {
    "up_blocks.0.resnets.0": 16,
    "up_blocks.0.resnets.1": 16,
    "up_blocks.1.resnets.0": 16,
    "up_blocks.1.resnets.1": 8,
}
WORDS = {
    "qdiffusion": (
        "weight",
        "bias",
        "weight_quantizer",
        "weight_quantizer_0",
        "act_quantizer",
        "act_quantizer_0",
    ),
    "tfmq": ("w", "b", "wqtizer", "wqtizer1", "aqtizer", "aqtizer1"),
}
WORDS |= {"quest": WORDS["qdiffusion"], "brecq": WORDS["qdiffusion"], "dgq": WORDS["tfmq"]}


@dataclass
class Published:
    """What was written.

    Attributes:
        state: of the weights.
        steps: tables of activations by step, in the layout that has them.
        codes: of every weight by the diffusers path, part by part.
        inputs: (delta, zero point) of every input by the diffusers path, part by part; [K] by step.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: list[dict[str, torch.Tensor]] = field(default_factory=list)
    codes: dict[str, list[Array]] = field(default_factory=dict)
    inputs: dict[str, list[tuple[Array, Array]]] = field(default_factory=dict)

    def save(self, path: Path, method: str) -> Path:
        content: Any = self.state
        if WORDS[method] is WORDS["tfmq"]:
            content = {"weight": self.state} | {f"act_{i}": step for i, step in enumerate(self.steps)}
        torch.save(content, path)
        return path


ENDS = ("conv_in", "conv_out")
FIRST_OF_TIME = "time_embedding.linear_1"  # has learned roundings that are never used


def published(
    model: Path,
    method: str,
    *,
    names: str = "diffusers",
    bits: int = 4,
    split: bool = False,
    activations: str = "",
    steps: int = 1,
    learned: bool = True,
    heads: int = 4,
    left_out: bool = False,
    seed: int = 0,
) -> Published:
    """A quantized network of a model's weights.

    Args:
        model: folder of a tiny pipeline.
        method: whose words are used.
        names: ``diffusers``, ``compvis`` or ``ddim``.
        bits: of weights.
        split: shortcuts of the way up in halves.
        activations: ``""``, ``asymmetric`` or ``symmetric``; of 8 bits.
        steps: tables of activations.
        learned: whether there are roundings.
        heads: of attentions whose q, k and v are one convolution.
        left_out: shortcuts and layers that lower the resolution as torch has them, and those at the ends with scales
            that are never used: what TFMQ-DM's script for DDIM's networks saves.
        seed: of the roundings and scales.
    """
    made, random = Published(), np.random.default_rng(seed)
    weight_word, bias_word, *words = WORDS[method]
    made.steps = [{} for _ in range(steps)] if WORDS[method] is WORDS["tfmq"] and activations else []
    for paths, name, weight, bias, rows in _layers(model, names, heads):
        if left_out and (paths[0].endswith("conv_shortcut") or ".downsamplers." in paths[0]):
            made.state[f"model.{name}.weight"] = torch.from_numpy(weight.copy())
            made.state[f"model.{name}.bias"] = torch.from_numpy(np.asarray(bias).copy())
            continue
        made.state[f"model.{name}.{weight_word}"] = torch.from_numpy(weight.copy())
        if bias is not None:
            made.state[f"model.{name}.{bias_word}"] = torch.from_numpy(bias.copy())
        half = HALVES.get(paths[0].removesuffix(".conv_shortcut")) if split else None
        shortcut = half is not None and paths[0].endswith("conv_shortcut")
        parts = np.split(weight, [half], axis=1) if shortcut else [weight]
        for number, part in enumerate(parts):
            delta, zero, alpha, codes = _quantized(part, bits, random if learned else None)
            start = f"model.{name}.{words[number]}"
            made.state[f"{start}.delta"], made.state[f"{start}.zero_point"] = map(
                torch.from_numpy, (delta, zero)
            )
            if left_out and paths[0] in ENDS:
                alpha = None
            if alpha is not None:
                made.state[f"{start}.alpha"] = torch.from_numpy(alpha)
            if left_out and paths[0] in (*ENDS, FIRST_OF_TIME):
                continue
            for path, chosen in zip(paths, rows, strict=True):
                made.codes.setdefault(path, []).append(codes[chosen])
            if not activations:
                continue
            step_of = (random.uniform(0.02, 0.06, steps)).astype(np.float32)
            zeros = random.integers(90, 160, steps) if activations == "asymmetric" else np.zeros(steps)
            grid = step_of, zeros.astype(np.float32)
            for path in paths:
                made.inputs.setdefault(path, []).append(grid)
            _write_input(made, method, f"model.{name}.{words[2 + number]}", grid, weight)
    return made


def _write_input(made: Published, method: str, start: str, grid: tuple[Array, Array], weight: Array) -> None:
    delta, zero = (torch.from_numpy(each) for each in grid)
    if made.steps:
        for number, step in enumerate(made.steps):
            step[f"{start}.delta"], step[f"{start}.zero_point"] = delta[number], zero[number]
    elif method == "quest":  # along the channels, even where all are alike
        shape = (len(delta), weight.shape[1], 1, 1) if weight.ndim == 4 else (len(delta), 1, weight.shape[1])
        made.state[f"{start}.delta_list"] = delta.view(-1, 1, *[1] * (len(shape) - 2)).expand(shape).clone()
        made.state[f"{start}.zero_point_list"] = (
            zero.view(-1, 1, *[1] * (len(shape) - 2)).expand(shape).clone()
        )
    else:
        made.state[f"{start}.delta"], made.state[f"{start}.zero_point"] = delta[0], zero[0]


def _quantized(
    weight: Array, bits: int, random: np.random.Generator | None
) -> tuple[Array, Array, Array | None, Array]:
    flat = weight.reshape(len(weight), -1)
    shape = (-1, *[1] * (weight.ndim - 1))
    low, high = np.minimum(flat.min(1), 0), np.maximum(flat.max(1), 0)
    delta = ((high - low) / np.float32(2**bits - 1)).astype(np.float32).reshape(shape)
    zero = np.round(-low.reshape(shape) / delta).astype(np.float32)
    if random is None:
        codes = np.round(weight / delta) + zero
        return delta, zero, None, np.clip(codes, 0, 2**bits - 1)
    alpha = random.normal(size=weight.shape).astype(np.float32)
    codes = np.floor(weight / delta) + (alpha >= 0) + zero
    return delta, zero, alpha, np.clip(codes, 0, 2**bits - 1)


def _layers(
    model: Path, names: str, heads: int
) -> Iterator[tuple[list[str], str, Array, Array | None, list[Sequence[int] | slice]]]:
    """Paths in diffusers, the name in the file, weight and bias there, and the rows of each path."""
    tensors = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim > 1
    }
    for path, weight in weights.items():
        bias = tensors.get(f"{path}.bias")
        own = path.partition(".transformer_blocks.")[0].rpartition(".to_")[0]
        plain = bool(own) and not path.count("transformer_blocks")
        if names == "compvis" and plain and not path.endswith("to_out.0"):
            if path.endswith("to_q"):
                yield _joined(own, weights, tensors, heads)
            continue
        if names == "compvis" and plain:
            weight = weight[:, :, None]  # a one-dimensional convolution
        if names == "ddim" and plain:
            weight = weight[:, :, None, None]
        yield [path], _named(path, names), weight, bias, [slice(None)]


def _joined(own: str, weights: dict[str, Array], tensors: dict[str, Array], heads: int) -> Any:
    """q, k and v of an attention as one convolution whose channels go head by head."""
    paths = [f"{own}.to_{letter}" for letter in "qkv"]
    channels = len(weights[paths[0]])
    each, order = channels // heads, []
    for head in range(heads):
        for part in range(3):
            order += [part * channels + head * each + i for i in range(each)]
    joined = np.concatenate([weights[path] for path in paths])[order][:, :, None]
    bias = np.concatenate([tensors[f"{path}.bias"] for path in paths])[order]
    place = np.argsort(order)
    rows = [place[part * channels : (part + 1) * channels] for part in range(3)]
    return paths, f"{COMPVIS[own]}.qkv", joined, bias, rows


def _named(path: str, names: str) -> str:
    if names == "diffusers":
        return path
    blocks, inner = (COMPVIS, COMPVIS_INNER) if names == "compvis" else (DDIM, DDIM_INNER)
    if path in blocks:
        return blocks[path]
    block = next(each for each in blocks if path.startswith(f"{each}."))
    rest = path[len(block) + 1 :]
    if rest == "conv":  # of a change of resolution
        down = "op" if block.startswith("down") else "conv"
        rest = down if names == "compvis" else "conv"
    elif "transformer_blocks" not in rest:
        rest = inner.get(rest, rest)
    return f"{blocks[block]}.{rest}"
