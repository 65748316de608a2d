"""Train the zoo's ``digits-dit``: a small class-conditional DiT on the latents of scikit-learn's digits.

    python -m tools.zoo.train_digits_dit --output digits-dit

One seed decides everything; a run that was stopped continues from its last snapshot.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.zoo import find_zoo_model
from tools.zoo.train_digits import SIZE, digits
from tools.zoo.training import Draws, fit, forget, write_log
from tools.zoo.training_options import options

LATENT_CHANNELS = 4
VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": SIZE,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
# DiTPipeline guides with class 1000, whatever the model: so many classes the table must hold.
NO_CLASS = 1000
TRANSFORMER = {
    "sample_size": SIZE // 2,
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "num_embeds_ada_norm": NO_CLASS,
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLING = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
VAE_STEPS, STEPS, BATCH = 1200, 8000, 64
VAE_RATE, RATE = 2e-3, 1e-3
KL_WEIGHT = 1e-3
UNCONDITIONAL = 0.1
_JUDGED, _JUDGED_STEPS = 200, 20


def train_vae(output: Path, seed: int, device: str) -> Any:
    """Train and write ``vae/``; return the autoencoder, in evaluation mode."""
    from diffusers import AutoencoderKL

    if (output / "vae").exists():
        return AutoencoderKL.from_pretrained(output / "vae").to(device).eval()
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(**VAE)
    vae.to(device)
    images = digits(train=True)[0]

    def loss_of(draws: Draws) -> Tensor:
        batch = images[torch.randint(len(images), (BATCH,), generator=draws.torch)].to(device)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws.torch).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / batch[0].numel()
        loss: Tensor = nn.functional.mse_loss(decoded, batch) + KL_WEIGHT * divergence
        return loss

    fit(vae, loss_of, name="vae", folder=output, steps=VAE_STEPS, rate=VAE_RATE, seed=seed, decay=0.99)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images.to(device)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
        held = digits(train=False)[0].to(device)
        error = (vae.decode(vae.encode(held).latent_dist.mean).sample.clamp(-1, 1) - held).square()
    vae.save_pretrained(output / "vae")
    psnr = 10 * (4 / error.mean((1, 2, 3))).log10()
    write_log(output, {"network": "vae", "held_out_psnr_db": round(psnr.mean().item(), 2)})
    return vae


def train_denoiser(output: Path, vae: Any, seed: int, steps: int, device: str) -> None:
    """Train the transformer on noise prediction with dropped classes; write the whole pipeline."""
    from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    # Each block of diffusers' DiT drops classes on its own in training mode, so that some block would always
    # know the class; in evaluation mode none does, and there is no other dropout.
    transformer: Any = DiTTransformer2DModel(**TRANSFORMER)
    transformer.to(device).eval()
    images, labels = digits(train=True)
    with torch.no_grad():
        latents = vae.encode(images.to(device)).latent_dist.mean.cpu() * vae.config.scaling_factor
    noising: Any = DDPMScheduler(**SCHEDULER)

    def loss_of(draws: Draws) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=draws.torch)
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=draws.torch)
        t = torch.randint(0, 1000, (BATCH,), generator=draws.torch)
        dropped = torch.rand(BATCH, generator=draws.torch) < UNCONDITIONAL
        classes = labels[rows].masked_fill(dropped, NO_CLASS)
        noisy = noising.add_noise(latents[rows], noise, t)
        predicted = transformer(noisy.to(device), t.to(device), classes.to(device)).sample
        return nn.functional.mse_loss(predicted, noise.to(device))

    def pipeline() -> Any:
        return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(**SCHEDULER, **SAMPLING))

    fit(
        transformer,
        loss_of,
        name="transformer",
        folder=output,
        steps=steps,
        rate=RATE,
        seed=seed,
        decay=0.999,
        averaged=lambda: pipeline().save_pretrained(output),
    )
    pipeline().save_pretrained(output)
    write_log(output, {"network": "transformer", **_judge(pipeline(), output)})


def _judge(pipeline: Any, output: Path) -> dict[str, Any]:
    """How many guided samples the digits' feature network takes for the class that they were asked to show."""
    from qdeploy.evaluate.features import FeatureNetwork
    from qdeploy.model.pipeline import generate

    pipeline.set_progress_bar_config(disable=True)
    classes = [number % 10 for number in range(_JUDGED)]
    images = generate(pipeline, range(_JUDGED), _JUDGED_STEPS, [str(number) for number in classes]).values
    with torch.no_grad():
        seen = FeatureNetwork.load(output / "features")(images * 2 - 1).argmax(1)
    right = (seen == torch.tensor(classes)).float().mean().item()
    return {"samples": _JUDGED, "class_accuracy": round(right, 4)}


def main() -> None:
    """Train both networks into ``--output``; the feature network is that of ``digits``."""
    chosen = options("zoo's digits-dit", STEPS)
    source = find_zoo_model("digits")
    if source is not None:
        shutil.copytree(source / "features", chosen.output / "features", dirs_exist_ok=True)
    vae = train_vae(chosen.output, chosen.seed, chosen.device)
    train_denoiser(chosen.output, vae, chosen.seed, chosen.steps, chosen.device)
    forget(chosen.output)


if __name__ == "__main__":
    main()
