"""Train the zoo's ``digits``: a DDPM on scikit-learn's handwritten digits, and its feature network.

    python -m tools.zoo.train_digits --output qdeploy/zoo/digits

Runs on a CPU (about 40 minutes on two cores) or on CUDA where present. One seed decides everything;
a run that was stopped continues from its last snapshot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.evaluate.features import FeatureNetwork
from tools.zoo.training import bf16_where_fast

SIZE = 16
UNET = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 16,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "dropout": 0.1,
}


def digits(train: bool) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 16, 16]`` in [-1, 1] and labels ``[N]`` of one half of a fixed 80/20 split.

    The 8x8 originals hold 17 grey levels; they are enlarged bilinearly so that the U-Net has room
    for three resolutions.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
    labels = torch.from_numpy(data.target).long()
    halves = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    rows = torch.tensor(halves[0 if train else 1])
    return images[rows], labels[rows]


def batches(count: int, size: int, seed: int, skip: int = 0) -> Iterator[Tensor]:
    """Endless shuffled minibatches of row numbers; ``skip`` of them are passed over."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            if skip:
                skip -= 1
                continue
            yield order[start : start + size]


def train_features(output: Path, seed: int, steps: int, log: Path) -> None:
    """Train the classifier; write it with the feature statistics of all real images."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    images, labels = digits(train=True)
    network = FeatureNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _, rows in zip(range(steps), batches(len(images), 64, seed), strict=False):
        shift = torch.randint(-1, 2, (2,)).tolist()
        batch = torch.roll(images[rows], shift, dims=(2, 3))
        loss = nn.functional.cross_entropy(network(batch), labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    held_images, held_labels = digits(train=False)
    with torch.no_grad():
        accuracy = (network(held_images).argmax(1) == held_labels).float().mean().item()
        features = network.features(torch.cat([images, held_images])).double()
    network.save(output)
    save_file(
        {"mean": features.mean(0), "covariance": torch.cov(features.T), "count": torch.tensor(len(features))},
        output / "statistics.safetensors",
    )
    _log(log, {"network": "features", "steps": steps, "seed": seed, "held_out_accuracy": round(accuracy, 4)})


def train_denoiser(output: Path, seed: int, steps: int, batch: int, device: str, log: Path) -> None:
    """Train the DDPM with the noise-prediction loss (Ho et al. 2020, equation 14) and keep its EMA."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    unet: Any = UNet2DModel(**UNET)
    unet.to(device)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    snapshot = output / "training.snapshot"
    start = 0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"].cpu())
        start = state["step"]
    images = digits(train=True)[0].to(device)
    total, began = 0.0, time.perf_counter()
    rows_of = batches(len(images), batch, seed, skip=start)
    for step, rows in zip(range(start + 1, steps + 1), rows_of, strict=False):
        clean = images[rows.to(device)]
        noise = torch.randn(clean.shape).to(device)
        t = torch.randint(0, 1000, (len(clean),)).to(device)
        noisy = scheduler.add_noise(clean, noise, t)
        with bf16_where_fast(device):
            predicted = unet(noisy, t).sample
        loss = nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        total += loss.item()
        if step % 250 == 0 or step == steps:
            seconds = time.perf_counter() - began
            _log(log, {"step": step, "loss": round(total / min(step, 250), 5), "seconds": round(seconds, 1)})
            total = 0.0
        if step % 1000 == 0 or step == steps:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            pipeline: Any = DDPMPipeline(unet=unet, scheduler=scheduler)
            pipeline.save_pretrained(output)
            ema.restore(unet.parameters())
            _save_snapshot(snapshot, unet, ema, optimizer, schedule, step)
    snapshot.unlink(missing_ok=True)


def _save_snapshot(path: Path, unet: nn.Module, ema: Any, optimizer: Any, schedule: Any, step: int) -> None:
    state = {
        "unet": unet.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _log(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    with path.open("a") as stream:
        stream.write(line + "\n")


def main() -> None:
    """Train both networks into ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--feature-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "training.log"
    if not (arguments.output / "features" / "features.safetensors").exists():
        train_features(arguments.output / "features", arguments.seed, arguments.feature_steps, log)
    train_denoiser(arguments.output, arguments.seed, arguments.steps, arguments.batch, arguments.device, log)


if __name__ == "__main__":
    main()
