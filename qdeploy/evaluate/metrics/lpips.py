"""LPIPS: perceptual distance of images from the same seeds (Zhang et al. 2018), where its weights are available.

The folder holds two files under their published names: VGG-16's ``vgg16-397923af.pth`` (torchvision) and the
linear weights ``vgg.pth`` (richzhang/PerceptualSimilarity, v0.1). Distances are those of version 0.1 with VGG.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.base import Metric
from qdeploy.evaluate.metrics.paired import PairedMeter
from qdeploy.system.errors import InvalidInputError

BACKBONE, LINEAR = "vgg16-397923af.pth", "vgg.pth"
# VGG-16's convolutions by stage: the width of each layer. Features are taken at the end of each stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The network; weights come from `load`."""

    def __init__(self) -> None:
        super().__init__()
        width, stages = 3, []
        for number, widths in enumerate(STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] * (number > 0)
            for out in widths:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.linear = nn.ParameterList([torch.zeros(widths[-1]) for widths in STAGES])

    def forward(self, images: Tensor, expected: Tensor) -> Tensor:
        """[N] distances of images [N, 3, H, W] in [0, 1]."""
        both = torch.cat([images, expected]).float() * 2 - 1
        x = (both - both.new_tensor(_SHIFT).view(1, 3, 1, 1)) / both.new_tensor(_SCALE).view(1, 3, 1, 1)
        total = both.new_zeros(len(images))
        for stage, weights in zip(self.stages, self.linear, strict=True):
            x = stage(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            one, other = unit.chunk(2)
            total = total + ((one - other).square() * weights.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    @classmethod
    def load(cls, folder: Path) -> Lpips:
        """The network with the weights of both files.

        Raises:
            InvalidInputError: a file is missing or holds something else.
        """
        network, backbone, linear = cls(), _read(folder / BACKBONE), _read(folder / LINEAR)
        convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        numbers = sorted({int(name.split(".")[1]) for name in backbone if name.startswith("features.")})
        try:
            for layer, number in zip(convolutions, numbers, strict=True):
                for part in ("weight", "bias"):
                    getattr(layer, part).data.copy_(backbone[f"features.{number}.{part}"])
            for number, weights in enumerate(network.linear):
                weights.data.copy_(linear[f"lin{number}.model.1.weight"].flatten())
        except (KeyError, RuntimeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InvalidInputError(
                f"{folder} does not hold LPIPS's weights with VGG-16: {reason}"
            ) from error
        return network.eval().requires_grad_(False)


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        what = "does not exist" if not file.exists() else "is no file of weights"
        raise InvalidInputError(f"LPIPS needs {BACKBONE} and {LINEAR}: {file} {what}") from error
    return state


def _begin(context: MetricContext) -> PairedMeter | None:
    if context.lpips is None:
        return None
    network = Lpips.load(Path(context.lpips))

    def compare(images: Tensor, expected: Tensor) -> list[float]:
        with torch.no_grad():
            values: list[float] = network(
                images.expand(-1, 3, -1, -1), expected.expand(-1, 3, -1, -1)
            ).tolist()
        return values

    return PairedMeter(compare, 4, network="VGG-16, version 0.1")


METRIC = Metric("lpips", "perceptual distance of images on the same seeds", begin=_begin)
