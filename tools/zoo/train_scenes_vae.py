"""Train the autoencoder of the zoo's ``scenes``.

python -m tools.zoo.train_scenes_vae --output scenes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.evaluate.scene_world import random_scene
from tools.zoo.scene_drawing import PIXELS, draw, random_layout
from tools.zoo.training import Draws, bf16_where_fast, fit, write_log
from tools.zoo.training_options import options

LATENT_CHANNELS = 8
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": PIXELS,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
}
STEPS, RATE = 2500, 2e-3
# Most steps see crops around things, as the background has little to teach; the last ones whole pictures.
CROP, CROPS, WHOLE, WHOLE_SHARE = 32, 32, 12, 0.16
# Of pixels that belong to a thing.
THING_WEIGHT = 4.0
# Of the Kullback-Leibler divergence per pixel value: strong enough that close latents mean close pictures.
KL_WEIGHT = 2e-3
_TESTED, _FITTED = 64, 512


def pictures(count: int, draws: Draws, held_out: bool = False) -> Tensor:
    """Random pictures ``[count, 3, 64, 64]`` in [-1, 1]."""
    made = []
    for _ in range(count):
        scene = random_scene(draws.numpy, held_out)
        made.append(torch.from_numpy(draw(scene, random_layout(scene, draws.numpy), draws.numpy)))
    return torch.stack(made) * 2 - 1


def crops(count: int, draws: Draws) -> Tensor:
    """Random parts ``[count, 3, 32, 32]`` of pictures, each around a thing, in [-1, 1]."""
    made = []
    for _ in range(count):
        scene = random_scene(draws.numpy)
        layout = random_layout(scene, draws.numpy)
        picture = torch.from_numpy(draw(scene, layout, draws.numpy))
        x, y = layout.centres[draws.numpy.integers(len(layout.centres))] + draws.numpy.uniform(-8, 8, 2)
        left, top = (int(min(max(at - CROP / 2, 0), PIXELS - CROP)) for at in (x, y))
        made.append(picture[:, top : top + CROP, left : left + CROP])
    return torch.stack(made) * 2 - 1


def weights(images: Tensor) -> Tensor:
    """What each pixel counts, ``[N, 1, H, W]``: more where it differs from the background, the most common."""
    background = images.flatten(2).median(dim=2).values[..., None, None]
    things = ((images - background).abs().amax(1, keepdim=True) > 0.04).float()
    return 1 + (THING_WEIGHT - 1) * things


def standardize(vae: Any, mean: Tensor, deviation: Tensor) -> None:
    """Shift and scale each latent channel, inside the two convolutions around the latent: decoded pictures stay.

    Pipelines scale all channels by one factor; noise would hide a channel of small deviation long before one of
    large deviation.

    Args:
        vae: an `AutoencoderKL`, changed in place; its scaling factor becomes 1.
        mean: what becomes 0, ``[C]``.
        deviation: what becomes 1, ``[C]``.
    """
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    with torch.no_grad():
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.weight[:channels] /= deviation[:, None, None, None]
        into.bias[channels:] -= 2 * deviation.log()
        out_of.bias += out_of.weight[:, :, 0, 0] @ mean
        out_of.weight *= deviation[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def train_vae(output: Path, seed: int, steps: int, device: str) -> Any:
    """Train and write ``vae/``; return the autoencoder, in evaluation mode."""
    from diffusers import AutoencoderKL

    folder = output / "vae"
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).to(device).eval()
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(**VAE)
    vae.to(device)

    def loss_of(draws: Draws) -> Tensor:
        whole = draws.step > steps * (1 - WHOLE_SHARE)
        images = (pictures(WHOLE, draws) if whole else crops(CROPS, draws)).to(device)
        with bf16_where_fast(device):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draws.torch).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = (decoded - images).abs()
        divergence: Tensor = posterior.kl().float().mean() / images[0].numel()
        rebuilt: Tensor = (weights(images) * (error + error.square())).mean()
        return rebuilt + KL_WEIGHT * divergence

    fit(vae, loss_of, name="vae", folder=output, steps=steps, rate=RATE, seed=seed, decay=0.995)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures(_FITTED, Draws.of(seed, 0)).to(device)).latent_dist.mean
        standardize(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        held = pictures(_TESTED, Draws.of(seed, 0), held_out=True).to(device)
        error = (vae.decode(vae.encode(held).latent_dist.mean).sample.clamp(-1, 1) - held).square()
    psnr = 10 * (4 / error.mean((1, 2, 3))).log10()
    vae.save_pretrained(folder)
    write_log(output, {"network": "vae", "held_out_psnr_db": round(psnr.mean().item(), 2)})
    return vae


if __name__ == "__main__":
    chosen = options("autoencoder", STEPS)
    train_vae(chosen.output, chosen.seed, chosen.steps, chosen.device)
