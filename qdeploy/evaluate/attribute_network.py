"""The attribute network: reads the things and the background of a scene back from a picture.

A small detector after CenterNet (Zhou et al. 2019): a heat map has a peak at each thing's centre,
and further maps classify it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdeploy.evaluate.features import FeatureNetwork
from qdeploy.evaluate.scene_world import BACKGROUNDS, COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from typing import Self

# Pixels of the picture per cell of the maps.
STRIDE = 4
FOLDER = "attributes"
_NAMES = (list(SHAPES), list(COLOURS), list(SIZES))
_LENGTHS = [len(names) for names in _NAMES]
_SEEN = 0.4
_BATCH = 128


@dataclass(frozen=True)
class Found:
    """A thing that was found in a picture, with its centre in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    things: tuple[Found, ...]
    background: str


class AttributeNetwork(nn.Module):
    """A `FeatureNetwork` that classifies backgrounds, with a head on its last map that detects the things.

    Args:
        width: of the feature network's first stage.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.config = {"width": width}
        self.trunk = FeatureNetwork(3, width, len(BACKGROUNDS))
        wide = 2 * width
        # Dilation lets a cell see the largest thing whole.
        self.head = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
            nn.SiLU(),
            nn.Conv2d(wide, 1 + sum(_LENGTHS), 1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the maps ``[N, 1 + 13, H / 4, W / 4]`` and of backgrounds ``[N, 4]``, of images in [-1, 1].

        The first map holds centres; the others hold shapes, colours and sizes.
        """
        pool = len(self.trunk.stages) - 2
        last = self.trunk.stages[:pool](images)
        background = self.trunk.head(self.trunk.dropout(self.trunk.stages[pool:](last)))
        return self.head(last), background

    def read(self, images: Tensor) -> list[Reading]:
        """What pictures ``[N, 3, 64, 64]`` in [0, 1] show."""
        with torch.no_grad():
            return [reading for part in images.split(_BATCH) for reading in self._read(part)]

    def _read(self, images: Tensor) -> list[Reading]:
        maps, backgrounds = self(images * 2 - 1)
        heat = maps[:, 0].sigmoid()
        peaks = (heat == nn.functional.max_pool2d(heat, 3, 1, 1)) & (heat > _SEEN)
        choices = [part.argmax(1) for part in maps[:, 1:].split(_LENGTHS, dim=1)]
        names = list(BACKGROUNDS)
        readings = []
        for image, background in enumerate(backgrounds.argmax(1).tolist()):
            things = []
            for row, column in peaks[image].nonzero().tolist():
                shape, colour, size = (
                    options[int(choice[image, row, column])]
                    for options, choice in zip(_NAMES, choices, strict=True)
                )
                y, x = _centre(heat[image], row, column)
                things.append(Found(shape, colour, size, x, y))
            readings.append(Reading(tuple(things), names[background]))
        return readings

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``attributes.safetensors`` into ``folder``."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "attributes.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a network that `save` wrote, in evaluation mode."""
        from safetensors.torch import load_file

        network = cls(**json.loads((folder / "config.json").read_text()))
        network.load_state_dict(load_file(folder / "attributes.safetensors"))
        return network.eval()


def _centre(heat: Tensor, row: int, column: int) -> tuple[float, float]:
    """Centre of mass of the heat around a peak, as y and x in pixels."""
    top, left = max(row - 1, 0), max(column - 1, 0)
    near = heat[top : row + 2, left : column + 2]
    rows = torch.arange(top, top + near.shape[0]) + 0.5
    columns = torch.arange(left, left + near.shape[1]) + 0.5
    total = near.sum()
    y, x = (near.sum(1) * rows).sum() / total, (near.sum(0) * columns).sum() / total
    return float(y) * STRIDE, float(x) * STRIDE
