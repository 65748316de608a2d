"""Train the attribute network of the zoo's ``scenes``, and keep its trunk as the feature network of FD-local.

python -m tools.zoo.train_scenes_reader --output scenes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.evaluate.attribute_network import FOLDER, STRIDE, AttributeNetwork
from qdeploy.evaluate.scene_world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, random_scene
from tools.zoo.scene_drawing import PIXELS, Layout, draw, random_layout
from tools.zoo.training import Draws, fit, write_log
from tools.zoo.training_options import options

STEPS, BATCH, RATE = 1800, 32, 3e-3
_CELLS = PIXELS // STRIDE
_TESTED, _REAL = 1000, 4096
_LISTS = (list(SHAPES), list(COLOURS), list(SIZES))


def targets(scene: Scene, layout: Layout) -> tuple[Tensor, Tensor]:
    """The heat map ``[16, 16]``, and shape, colour and size ``[3, 16, 16]`` near centres, -1 elsewhere."""
    rows, columns = np.mgrid[:_CELLS, :_CELLS] + 0.5
    heat = np.zeros((_CELLS, _CELLS))
    kinds = np.full((3, _CELLS, _CELLS), -1)
    for thing, (x, y) in zip(scene.things, layout.centres / STRIDE, strict=True):
        distance = (columns - x) ** 2 + (rows - y) ** 2
        heat = np.maximum(heat, np.exp(-distance / 2))
        names = (thing.shape, thing.colour, thing.size)
        for kind, options_, name in zip(kinds, _LISTS, names, strict=True):
            kind[distance < 2.25] = options_.index(name)
    return torch.from_numpy(heat).float(), torch.from_numpy(kinds)


def worsened(images: Tensor, draws: Draws) -> Tensor:
    """Pictures ``[N, C, H, W]`` blurred and noisy to random degrees, as decoded samples can be."""
    random = draws.torch
    blurred = nn.functional.avg_pool2d(nn.functional.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(blurred, (1,) * 4, mode="replicate"), 3, 1)
    shape = (len(images), 1, 1, 1)
    blur = torch.rand(shape, generator=random) * (torch.rand(shape, generator=random) < 0.6)
    noise = 0.12 * torch.rand(shape, generator=random) ** 2
    return images + blur * (blurred - images) + noise * torch.randn(images.shape, generator=random)


def drawn(
    count: int, draws: Draws, held_out: bool = False
) -> tuple[Tensor, list[Scene], list[Layout], Tensor]:
    """Random pictures ``[count, 3, 64, 64]`` in [-1, 1], their scenes and layouts, and numbers of backgrounds."""
    scenes = [random_scene(draws.numpy, held_out) for _ in range(count)]
    layouts = [random_layout(scene, draws.numpy) for scene in scenes]
    pictures = [draw(*pair, draws.numpy) for pair in zip(scenes, layouts, strict=True)]
    images = torch.stack([torch.from_numpy(picture) for picture in pictures]) * 2 - 1
    return images, scenes, layouts, torch.tensor([list(BACKGROUNDS).index(s.background) for s in scenes])


def train_reader(output: Path, seed: int, steps: int, device: str) -> None:
    """Train and write ``attributes/`` and ``features/``, with the statistics of held-out real pictures."""
    if (output / FOLDER).exists():
        return
    torch.manual_seed(seed)
    network = AttributeNetwork().to(device)

    def loss_of(draws: Draws) -> Tensor:
        images, scenes, layouts, backgrounds = drawn(BATCH, draws)
        wanted = [targets(*pair) for pair in zip(scenes, layouts, strict=True)]
        heat, kinds = (torch.stack(part).to(device) for part in zip(*wanted, strict=True))
        maps, background = network(worsened(images, draws).to(device))
        # Few cells are near a centre, so the mean is made their size.
        loss = 20 * nn.functional.binary_cross_entropy_with_logits(maps[:, 0], heat)
        parts = maps[:, 1:].split([len(names) for names in _LISTS], dim=1)
        for number, logits in enumerate(parts):
            loss = loss + nn.functional.cross_entropy(logits, kinds[:, number], ignore_index=-1)
        return loss + nn.functional.cross_entropy(background, backgrounds.to(device))

    fit(network, loss_of, name="attributes", folder=output, steps=steps, rate=RATE, seed=seed, decay=0.99)
    network.eval().cpu()
    _test(network, output, seed)
    _write_features(network, output, seed)
    network.save(output / FOLDER)


def _test(network: AttributeNetwork, output: Path, seed: int) -> None:
    from qdeploy.evaluate.metrics.attributes import Tally
    from qdeploy.evaluate.scene_captions import caption

    for name, worse in (("clean", False), ("worsened", True)):
        draws = Draws.of(seed, 0)
        images, scenes, _, _ = drawn(_TESTED, draws, held_out=True)
        tally = Tally()
        shown = worsened(images, draws) if worse else images
        for scene, reading in zip(scenes, network.read((shown + 1) / 2), strict=True):
            tally.add(caption(scene), reading)
        accuracy = {attribute: value["accuracy"] for attribute, value in tally.result().items()}
        write_log(output, {"network": "attributes", "held_out": name, "pictures": _TESTED, **accuracy})


def _write_features(network: AttributeNetwork, output: Path, seed: int) -> None:
    from safetensors.torch import save_file

    network.trunk.save(output / "features")
    draws, parts = Draws.of(seed + 1, 0), []
    with torch.no_grad():
        for _ in range(_REAL // 128):
            parts.append(network.trunk.features(drawn(128, draws, held_out=True)[0]).double())
    features = torch.cat(parts)
    statistics = {"mean": features.mean(0), "covariance": torch.cov(features.T)}
    save_file(
        {**statistics, "count": torch.tensor(len(features))}, output / "features" / "statistics.safetensors"
    )


if __name__ == "__main__":
    chosen = options("attribute network", STEPS)
    train_reader(chosen.output, chosen.seed, chosen.steps, chosen.device)
