"""U-Nets of well-known shapes with random weights: for questions of size and speed, which weights do not decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qdeploy.zoo import find_zoo_model

# google/ddpm-cifar10-32's unet/config.json
CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# stable-diffusion-v1-5's unet/config.json; what it leaves out are the class's defaults
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SHAPES = ("digits", "cifar", "sd15")


def model_folder(shape: str, folder: Path) -> Path:
    """A diffusers folder of that shape; made if it is not there yet."""
    if shape == "digits":
        found = find_zoo_model("digits")
        assert found is not None
        return found
    path = folder / shape
    if not (path / "model_index.json").is_file():
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

        torch.manual_seed(0)
        unet = UNet2DModel(**CIFAR) if shape == "cifar" else UNet2DConditionModel(**SD15)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path
