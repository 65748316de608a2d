"""The feature network behind FD-local: a small classifier that is shipped with a zoo model.

Distances in its feature space compare images of one local data set. They are no FID: FID means
Inception-v3 features and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import Self


class FeatureNetwork(nn.Module):
    """A three-stage convolutional classifier whose pooled last stage is the feature vector.

    Args:
        channels: image channels C.
        width: channels of the first stage; the feature vector has ``2 * width`` entries.
        classes: number of classes.
    """

    def __init__(self, channels: int = 1, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.config = {"channels": channels, "width": width, "classes": classes}
        self.stages = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, classes)

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors ``[N, 2 * width]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        features: Tensor = self.stages(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Class logits ``[N, classes]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``features.safetensors`` into ``folder``."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "features.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a network that `save` wrote, in evaluation mode."""
        from safetensors.torch import load_file

        network = cls(**json.loads((folder / "config.json").read_text()))
        network.load_state_dict(load_file(folder / "features.safetensors"))
        return network.eval()
