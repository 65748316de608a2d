"""Resources of metrics besides the model: feature networks, real images, published networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qdeploy.evaluate.extractors import LOCAL, Extractor, Features, find_extractor
from qdeploy.evaluate.paired_sample import Pair
from qdeploy.model.folder import Model
from qdeploy.store.files import write_tensors
from qdeploy.store.paths import cache_folder
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file, sha256_of
from qdeploy.system.progress import say, track

FOLDER = "features"
LARGEST_SIDE = 8192  # pixels
MOST_PIXELS = 2**31  # of all images together: 6 GB
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PAIRED = "full precision, same seeds"


@dataclass
class MetricContext:
    """The resources that metrics may use.

    Attributes:
        model: the reference.
        features: path of a feature network, see `find_extractor`; the model's own ``features/`` if None.
        real: a folder of real images; without one, the reference's images are what sets are compared with.
        lpips: a folder with LPIPS's weights.
        clip: folder or Hub id of a CLIP model.
        prompts: used in turns by the images.
    """

    model: Model
    features: str | Path | None = None
    real: str | Path | None = None
    lpips: str | Path | None = None
    clip: str | Path | None = None
    prompts: Sequence[str] | None = None

    @cached_property
    def extractor(self) -> Extractor | None:
        """The feature network, if there is one."""
        if self.features is not None:
            return find_extractor(self.features)
        own = self.model.path / FOLDER
        return find_extractor(own) if (own / "features.safetensors").is_file() else None

    def check(self) -> None:
        """Refuse, before any work, what cannot be used.

        Raises:
            InvalidInputError: a path does not hold such a resource.
            CapabilityError: a package is missing.
        """
        if self.features is not None:
            assert self.extractor
        if self.real is not None:
            if self.extractor is None:
                raise InvalidInputError(
                    f"{self.model.path} has no feature network to compare real images in: name one with --features"
                )
            assert self.real_features

    @property
    def identity(self) -> list[str]:
        """What of the resources determines what metrics take from a pair."""
        extractor = "" if self.extractor is None else self.extractor.sha256
        files = [] if self.lpips is None else sorted(Path(self.lpips).glob("*.pth"))
        return [extractor, str(self.clip or ""), str(self.real or ""), *map(sha256_file, files)]

    def of(self, pair: Pair) -> tuple[Features, Features]:
        """Features of both sides of a pair, the reference's first; computed once for all metrics."""
        assert self.extractor is not None
        find = self.extractor.features
        return pair.once(self.extractor, lambda: (find(pair.expected_images), find(pair.images)))

    @cached_property
    def real_features(self) -> Features | None:
        """Features of the real images, kept in the cache."""
        if self.real is None or self.extractor is None:
            return None
        files = _pictures(Path(self.real))
        key = sha256_of([self.extractor.sha256, [sha256_file(file) for file in files]])
        kept = cache_folder() / "features" / f"{key[:32]}.safetensors"
        if not kept.is_file():
            say(f"features of {len(files)} real images in {self.real}")
            parts = [files[start : start + 64] for start in range(0, len(files), 64)]
            made = [self.extractor.features(read_pictures(part)) for part in track(parts, "real images")]
            write_tensors(kept, Features.joined(made).tensors())
        from safetensors.torch import load_file

        return Features(**load_file(kept))

    def description(self, count: int) -> dict[str, object]:
        """The entries that every result of a distribution metric has."""
        assert self.extractor is not None
        real = self.real_features
        return {
            "features": self.extractor.name,
            "reference": PAIRED if real is None else f"real images in {Path(str(self.real)).name}",
            "count": count,
            "reference_count": count if real is None else len(real.pooled),
        }

    def called(self, name: str) -> str:
        """``FID`` with Inception's features, ``FID-local`` with others."""
        assert self.extractor is not None
        return f"{name}-local" if self.extractor.name == LOCAL else name

    def check_size(self, pair: Pair) -> None:
        """Refuse real images of another size than those that are sampled.

        Raises:
            InvalidInputError: they are.
        """
        if self.real is None:
            return
        real, made = (
            list(read_pictures(_pictures(Path(self.real))[:1]).shape[1:]),
            list(pair.images.shape[1:]),
        )
        if real != made:
            raise InvalidInputError(
                f"the real images in {self.real} are {real}, and {made} are sampled (channels, height, width): "
                "resize them, or choose others"
            )


def _pictures(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
    files = [file for file in files if file.name != "grid.png"]
    if len(files) < 2:
        raise InvalidInputError(f"{folder} holds no set of images: two or more PNG or JPEG files are needed")
    return files


def read_pictures(files: list[Path]) -> Tensor:
    """Images [N, C, H, W], uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            with Image.open(file) as picture:
                _check_pixels(file, picture.size, len(files))
                shown = picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB")
                pixels = torch.from_numpy(np.array(shown))
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            ValueError,
            SyntaxError,
        ) as error:
            raise InvalidInputError(f"{file} is no readable image") from error
        images.append(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            sizes = [list(image.shape) for image in (images[0], images[-1])]
            raise InvalidInputError(
                f"{file} is {sizes[1]}, and {files[0].name} is {sizes[0]}: all must have one size"
            )
    return torch.stack(images)


def _check_pixels(file: Path, size: tuple[int, int], count: int) -> None:
    """Refuse an image by what its header says, before any of it is unpacked."""
    width, height = size
    if max(width, height) > LARGEST_SIDE or width * height * count > MOST_PIXELS:
        raise InvalidInputError(
            f"{file} has {width} x {height} pixels, too many for {count} images: use smaller ones, or fewer"
        )
