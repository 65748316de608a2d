"""Feature networks for distances between sets of images.

There are two. The *local* one is shipped with a zoo model. *Inception* is the network that published FIDs are made
with: torch-fidelity's, with its weights file by path. Nothing else is called FID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdeploy.evaluate.features import FeatureNetwork
from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.hashing import sha256_file

LOCAL, INCEPTION = "local", "inception"
SPATIAL_CHANNELS = 7  # of an inner layer, flattened: sFID (Nash et al. 2021, section 4)
_BATCH = 64


@dataclass(frozen=True)
class Features:
    """The features of images.

    Attributes:
        pooled: [N, D].
        spatial: [N, S] an inner layer's first channels at every place.
        logits: [N, C] of classes.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        return {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}

    @classmethod
    def joined(cls, parts: list[Features]) -> Features:
        """Those of all images of all parts."""
        return cls(*(torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()))


@dataclass(frozen=True)
class Extractor:
    """A feature network.

    Attributes:
        name: ``local`` or ``inception``.
        sha256: identity of its weights.
        run: features of images [N, C, H, W] in [0, 1], at most 64 at a time.
    """

    name: str
    sha256: str
    run: Callable[[Tensor], Features]

    def features(self, images: Tensor) -> Features:
        """Features of images [N, C, H, W] in [0, 1], float or uint8.

        Raises:
            InvalidInputError: the network cannot take such images.
        """
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        try:
            with torch.no_grad():
                return Features.joined([self.run(part) for part in images.split(_BATCH)])
        except RuntimeError as error:
            raise InvalidInputError(
                f"the {self.name} feature network cannot take images of {list(images.shape[1:])}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def find_extractor(features: str | Path) -> Extractor:
    """The feature network at a path: a folder that `FeatureNetwork.save` wrote, or Inception's weights.

    Raises:
        InvalidInputError: there is neither.
        CapabilityError: Inception's code, torch-fidelity, is not installed.
    """
    path = Path(features)
    if path.is_file():
        return _inception(path)
    file = path / "features.safetensors"
    if not file.is_file() or not (path / "config.json").is_file():
        raise InvalidInputError(
            f"{path} is no feature network: name a folder with config.json and features.safetensors, or the file "
            "weights-inception-2015-12-05-6d3c4c5d.pth"
        )
    return _local(path, file)


def _local(folder: Path, file: Path) -> Extractor:
    from safetensors import SafetensorError

    try:
        network = FeatureNetwork.load(folder)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{folder} is no feature network: {str(error).splitlines()[0]}") from error

    def run(images: Tensor) -> Features:
        inner = network.stages[:8](images * 2 - 1)
        pooled = network.stages[8:](inner)
        return Features(pooled, inner[:, :SPATIAL_CHANNELS].flatten(1), network.head(pooled))

    return Extractor(LOCAL, sha256_file(file), run)


def _inception(file: Path) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise CapabilityError(
            "Inception's features need torch-fidelity and torchvision: pip install 'qdeploy[metrics]' "
            f"({str(error).splitlines()[0]})"
        ) from error
    wanted = ["768", "2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3(INCEPTION, wanted, feature_extractor_weights_path=str(file))
    except Exception as error:  # torch.load has many ways to fail
        raise InvalidInputError(
            f"{file} holds no Inception weights of torch-fidelity: {(str(error) or 'unknown').splitlines()[0]}"
        ) from error
    inner: list[Tensor] = []
    network.Mixed_6d.register_forward_hook(lambda module, args, output: inner.append(output))

    def run(images: Tensor) -> Features:
        colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        _, pooled, logits = network((colours * 255).round().to(torch.uint8))
        return Features(pooled, inner.pop()[:, :SPATIAL_CHANNELS].flatten(1), logits)

    return Extractor(INCEPTION, sha256_file(file), run)
