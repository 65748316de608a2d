"""How well a model of scenes follows prompts whose combinations it never saw: numbers, and a picture of 16.

python -m tools.zoo.judge_scenes scenes --samples 512 --picture samples.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdeploy.evaluate.attribute_network import FOLDER, AttributeNetwork
from qdeploy.evaluate.scene_captions import caption
from qdeploy.evaluate.scene_world import Scene, random_scene

STEPS, GUIDANCE, BATCH = 25, 4.0, 32
_SHOWN, _COLUMNS = 16, 4


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Full captions of random held-out scenes: in turns one thing, equal things, and twice different ones."""
    return _prompts(count, seed, held_out=True)


def seen_prompts(count: int, seed: int = 0) -> list[str]:
    """The same of scenes that training may have seen: to calibrate with, so that held-out ones judge."""
    return _prompts(count, seed, held_out=False)


def _prompts(count: int, seed: int, held_out: bool) -> list[str]:
    generator = np.random.default_rng(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        scene = random_scene(generator, held_out)
        if _turn(scene) == (0, 1, 2, 2)[len(prompts) % 4]:
            prompts.append(caption(scene, turned=bool(generator.random() < 0.5)))
    return prompts


def _turn(scene: Scene) -> int:
    if scene.relation is not None:
        return 2
    return 1 if len(scene.things) > 1 else 0


def sampled(pipeline: Any, prompts: Sequence[str], steps: int, guidance: float, seed: int) -> Tensor:
    """One image ``[3, 64, 64]`` in [0, 1] per prompt; image i has the seed ``seed + i``."""
    from qdeploy.model.pipeline import generate

    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = range(seed + start, seed + start + len(part))
        parts.append(generate(pipeline, seeds, steps, part, guidance).values)
    return torch.cat(parts)


def picture(images: Tensor, prompts: Sequence[str], file: Path) -> None:
    """Draw images in a grid with their prompts below them."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // _COLUMNS)
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.55 * rows), dpi=110, layout="constrained")
    for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        axes = figure.add_subplot(rows, _COLUMNS, place + 1)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        words = prompt.replace(" on a ", "\non a ")
        for relation in (" left of ", " right of ", " above ", " below "):
            words = words.replace(relation, f"\n{relation.strip()} ")
        axes.set_title(words, fontsize=7, y=-0.05, va="top")
    figure.savefig(file)


def main() -> None:
    """Print the accuracy of every attribute as one JSON object."""
    from qdeploy.evaluate.metrics.attributes import attribute_accuracy
    from qdeploy.model.folder import open_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    model = open_model(chosen.model)
    pipeline = model.pipeline()
    prompts = held_out_prompts(chosen.samples, chosen.seed)
    images = sampled(pipeline, prompts, chosen.steps, chosen.guidance, chosen.seed).clamp(0, 1)
    if chosen.picture is not None:
        picture(images[:_SHOWN], prompts[:_SHOWN], chosen.picture)
    network = AttributeNetwork.load(model.path / FOLDER)
    print(json.dumps(attribute_accuracy(images, prompts, network), indent=2))


if __name__ == "__main__":
    main()
