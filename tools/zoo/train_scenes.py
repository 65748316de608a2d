"""Train the zoo's ``scenes``: a latent text-to-image model in the layout of Stable Diffusion 1.5.

    python -m tools.zoo.train_scenes --output scenes

Trains the autoencoder, the attribute network, then the text encoder and the U-Net together. One seed
decides everything; a run that was stopped continues from its last snapshot, and a finished model is trained
further.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qdeploy.evaluate.scene_captions import caption
from qdeploy.evaluate.scene_world import Scene, random_scene
from tools.zoo.scene_drawing import draw, random_layout
from tools.zoo.scene_text import WIDTH, new_text_encoder, tokenize, write_tokenizer
from tools.zoo.train_scenes_reader import STEPS as READER_STEPS
from tools.zoo.train_scenes_reader import train_reader
from tools.zoo.train_scenes_vae import LATENT_CHANNELS, train_vae
from tools.zoo.train_scenes_vae import STEPS as VAE_STEPS
from tools.zoo.training import Draws, bf16_where_fast, fit, forget
from tools.zoo.training_options import options

UNET = {
    "sample_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
# Ends in more noise than Stable Diffusion's schedule: in so small a latent, the rest of a picture's mean
# colour could be read from the last step of that one.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    # The noise that a prompt could explain is next to nothing at the steps where a prompt decides the picture.
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
STEPS, BATCH, RATE = 5000, 64, 1e-3
SCENES = 20_000
UNCONDITIONAL = 0.1
# Steps of a higher signal-to-noise ratio, where only details are left, count less (Hang et al. 2023,
# "Efficient Diffusion Training via Min-SNR Weighting Strategy"); the others count alike.
MOST_SNR = 5.0


# Of this share of the rows the timestep is drawn around the middle, where shapes take form; of the others,
# evenly (after Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1: logit-normal sampling).
MIDDLE, MIDDLE_MEAN = 0.6, -0.3


class Conditional(nn.Module):
    """The text encoder and the U-Net, trained as one."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The velocity of latents ``[N, 8, 8, 8]``, given token numbers ``[N, 24]``."""
        predicted: Tensor = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample
        return predicted


def timesteps_of(generator: torch.Generator) -> Tensor:
    """One timestep ``[BATCH]`` per row, in 0 to 999."""
    even = torch.rand(BATCH, generator=generator)
    middle = torch.sigmoid(torch.randn(BATCH, generator=generator) + MIDDLE_MEAN)
    chosen = torch.rand(BATCH, generator=generator) < MIDDLE
    return (torch.where(chosen, middle, even) * 1000).long().clamp(max=999)


def training_latents(vae: Any, output: Path, seed: int, device: str) -> tuple[list[Scene], Tensor, Tensor]:
    """The training scenes, and mean and deviation ``[N, 8, 8, 8]`` of their latents, kept in a file."""
    from safetensors.torch import load_file, save_file

    file = output / _LATENTS
    scenes: list[Scene] = []
    parts: list[tuple[Tensor, Tensor]] = []
    stored = load_file(file) if file.exists() else None
    for start in range(0, SCENES, 500):
        # The scenes themselves are drawn again each time; they cost little beside their latents.
        draws = Draws.of(seed, -start - 1 + 2**31)
        batch = [random_scene(draws.numpy) for _ in range(500)]
        scenes += batch
        if stored is None:
            drawn = [draw(scene, random_layout(scene, draws.numpy), draws.numpy) for scene in batch]
            images = torch.stack([torch.from_numpy(picture) for picture in drawn]) * 2 - 1
            with torch.no_grad():
                posterior = vae.encode(images.to(device)).latent_dist
            parts.append((posterior.mean.cpu(), posterior.std.cpu()))
    if stored is None:
        mean, std = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        stored = {"mean": mean, "std": std}
        partial = file.with_suffix(".partial")
        save_file(stored, partial)
        partial.replace(file)
    return scenes, stored["mean"], stored["std"]


def train_denoiser(output: Path, vae: Any, seed: int, steps: int, device: str) -> None:
    """Train text encoder and U-Net on velocities with dropped prompts; write the whole pipeline."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    write_tokenizer(output / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    torch.manual_seed(seed)
    if (output / "unet").exists():
        text_encoder = CLIPTextModel.from_pretrained(output / "text_encoder").train()
        unet = UNet2DConditionModel.from_pretrained(output / "unet").train()
    else:
        text_encoder, unet = new_text_encoder(tokenizer), UNet2DConditionModel(**UNET)
    model = Conditional(text_encoder, unet).to(device)
    scenes, means, deviations = training_latents(vae, output, seed, device)
    scale = vae.config.scaling_factor
    noising: Any = DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k in _NOISING})
    snr = noising.alphas_cumprod / (1 - noising.alphas_cumprod)
    weights = (snr.clamp(max=MOST_SNR) / snr).to(device)

    def loss_of(draws: Draws) -> Tensor:
        rows = torch.randint(len(scenes), (BATCH,), generator=draws.torch)
        texts = [caption(scenes[row], draws.numpy) for row in rows.tolist()]
        texts = [text if draws.numpy.random() >= UNCONDITIONAL else "" for text in texts]
        spread, noise = (torch.randn(means[rows].shape, generator=draws.torch) for _ in range(2))
        clean = (means[rows] + deviations[rows] * spread) * scale
        t = timesteps_of(draws.torch)
        noisy = noising.add_noise(clean, noise, t)
        # The fused attention of CPUs is slow backwards over so few tokens.
        with bf16_where_fast(device), sdpa_kernel(SDPBackend.MATH):
            predicted = model(noisy.to(device), t.to(device), tokenize(tokenizer, texts).to(device))
        velocity = noising.get_velocity(clean, noise, t).to(device)
        errors = (predicted.float() - velocity).square().mean((1, 2, 3))
        loss: Tensor = (weights[t] * errors).mean()
        return loss

    def write() -> None:
        pipeline: Any = StableDiffusionPipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # What was loaded would tell the path it was loaded from.
        for part in (vae, model.unet):
            part.register_to_config(_name_or_path="")
        pipeline.save_pretrained(output)

    fit(
        model,
        loss_of,
        name="unet",
        folder=output,
        steps=steps,
        rate=RATE,
        seed=seed,
        decay=0.999,
        averaged=write,
    )
    write()


_LATENTS = "latents.safetensors"
_NOISING = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def main() -> None:
    """Train all networks into ``--output``."""
    chosen = options("zoo's scenes", STEPS)
    vae = train_vae(chosen.output, chosen.seed, VAE_STEPS, chosen.device)
    train_reader(chosen.output, chosen.seed, READER_STEPS, chosen.device)
    train_denoiser(chosen.output, vae, chosen.seed, chosen.steps, chosen.device)
    forget(chosen.output)
    (chosen.output / _LATENTS).unlink()


if __name__ == "__main__":
    main()
