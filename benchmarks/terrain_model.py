"""A trained diffusion model that nobody here made: the consistency U-Net of adaptive-terrain-diffusion.

The package (PyPI, 0.4.2, MIT licence) ships an ADM U-Net of 10.45 million parameters as ONNX: height maps of 128 x
128 pixels, 100 difficulties. `terrain_folder` fetches the wheel by name and writes the network as a diffusers
pipeline: scale-shift residual blocks, up- and downsampling inside of them, attention, classes. Nothing of it is in
this repository.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHEEL = "adaptive-terrain-diffusion==0.4.2"
GRAPH = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
CHANNELS = (32, 32, 64, 96, 128)
ATTENDS = (False, False, True, True, True)  # the levels that have attention
BLOCKS = 4  # of a level on the way down; one more on the way up
DIFFICULTIES = 100


def terrain_folder(folder: Path) -> Path:
    """The model as a diffusers folder below ``folder``; fetched and converted if it is not there yet.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be fetched.
    """
    made = folder / "terrain"
    if not (made / "model_index.json").is_file():
        _pipeline(_fetched(folder)).save_pretrained(made)
    return made


def _fetched(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("adaptive_terrain_diffusion-*.whl"))) as wheel:
        return Path(wheel.extract(GRAPH, folder / "unpacked"))


def _pipeline(graph: Path) -> Any:
    import diffusers

    resnet, attention = "ResnetDownsampleBlock2D", "AttnDownBlock2D"
    network = diffusers.UNet2DModel(
        sample_size=128, in_channels=1, out_channels=1, layers_per_block=BLOCKS, block_out_channels=CHANNELS,
        norm_num_groups=32, norm_eps=1e-5, attention_head_dim=32, attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        down_block_types=tuple(attention if attends else resnet for attends in ATTENDS),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in ATTENDS[::-1]),
        num_class_embeds=DIFFICULTIES,
    )  # fmt: skip
    network.load_state_dict(_state(graph))
    scheduler = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, s_noise=1.0, rho=7.0,
        clip_denoised=True,
    )  # fmt: skip
    return diffusers.ConsistencyModelPipeline(unet=network.eval(), scheduler=scheduler)


def _state(graph: Path) -> dict[str, Tensor]:
    """The graph's weights under diffusers' names."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph).graph
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.initializer
    }
    norms, state = _norms(model, stored), {}

    def take(name: str, source: str) -> None:
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = stored[f"network.{source}.{part}"]

    def take_norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = next(norms)

    def take_block(name: str, source: str) -> None:
        take_norm(f"{name}.norm1")
        take(f"{name}.conv1", f"{source}.in_layers.2")
        take(f"{name}.time_emb_proj", f"{source}.emb_layers.1")
        take_norm(f"{name}.norm2")
        take(f"{name}.conv2", f"{source}.out_layers.3")
        if f"network.{source}.skip_connection.weight" in stored:
            take(f"{name}.conv_shortcut", f"{source}.skip_connection")

    def take_attention(name: str, source: str) -> None:
        take_norm(f"{name}.group_norm")
        for part in ("weight", "bias"):
            projections = stored[f"network.{source}.qkv.{part}"].squeeze().chunk(3)
            for kind, projection in zip("qkv", projections, strict=True):
                state[f"{name}.to_{kind}.{part}"] = projection.clone()
            state[f"{name}.to_out.0.{part}"] = stored[f"network.{source}.proj_out.{part}"].squeeze()

    take("time_embedding.linear_1", "time_embed.0")
    take("time_embedding.linear_2", "time_embed.2")
    take("conv_in", "input_blocks.0.0")
    place = count(1)
    for level, attends in enumerate(ATTENDS):
        for block in range(BLOCKS):
            source = f"input_blocks.{next(place)}"
            take_block(f"down_blocks.{level}.resnets.{block}", f"{source}.0")
            if attends:
                take_attention(f"down_blocks.{level}.attentions.{block}", f"{source}.1")
        if level < len(ATTENDS) - 1:
            take_block(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{next(place)}.0")
    take_block("mid_block.resnets.0", "middle_block.0")
    take_attention("mid_block.attentions.0", "middle_block.1")
    take_block("mid_block.resnets.1", "middle_block.2")
    place = count()
    for level, attends in enumerate(reversed(ATTENDS)):
        for block in range(BLOCKS + 1):
            source = f"output_blocks.{next(place)}"
            take_block(f"up_blocks.{level}.resnets.{block}", f"{source}.0")
            if attends:
                take_attention(f"up_blocks.{level}.attentions.{block}", f"{source}.1")
            if block == BLOCKS and level < len(ATTENDS) - 1:
                take_block(f"up_blocks.{level}.upsamplers.0", f"{source}.{2 if attends else 1}")
    take_norm("conv_norm_out")
    take("conv_out", "out.2")
    state["class_embedding.weight"] = _class_embedding(stored)
    return state


def _norms(graph: Any, stored: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Factor and shift of each normalization, in order of execution: the graph has no names for them."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def reader(node: Any, kind: str) -> Any:
        return next(other for other in readers[node.output[0]] if other.op_type == kind)

    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            factor = reader(reader(node, "Reshape"), "Mul")
            both = (factor, reader(factor, "Add"))
            weight, bias = (
                next(stored[name].flatten() for name in each.input if name in stored) for each in both
            )
            yield weight, bias


def _class_embedding(stored: dict[str, Tensor]) -> Tensor:
    """What the network makes of each difficulty, a number from 0 to 1: exact for whole classes."""
    x = (torch.arange(DIFFICULTIES).float() / (DIFFICULTIES - 1))[:, None]
    first, second = (
        [stored[f"network.label_emb.{number}.{part}"] for part in ("weight", "bias")] for number in (0, 2)
    )
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, *first))
    return torch.nn.functional.linear(hidden, *second)
