"""A folder of further inputs for a pipeline: images, masks, texts and tensors, by the pipeline's argument.

    image.png               one picture for all images that are made
    mask_image/0001.png     a picture for each, in the order of their names
    video/clip/0001.png     the frames of a video for each
    source_prompt.txt       a line for each
    image_embeds.safetensors    one tensor ``[N, ...]``, a row for each

Where there are fewer than images to make, they are used in turns. Entries that hold several hold equally many, since
they belong together: image and mask, image and instruction.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.store.tensors import load_tensors
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_files

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LARGEST_PICTURE = 2**26  # pixels: 8192 by 8192
MOST_FILES = 100_000


@dataclass(frozen=True)
class InputFolder:
    """The inputs in a folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @cached_property
    def entries(self) -> dict[str, list[Any]]:
        """For each argument what belongs to image 0, 1, ...: files of pictures, lists of them, lines or rows.

        Raises:
            InvalidInputError: there is no such folder, it holds nothing, something of no known kind, or different
                numbers of things that belong together.
        """
        if not self.path.is_dir():
            raise InvalidInputError(f"{self.path} is no folder of inputs: it holds image/, mask_image/, ...")
        found = {entry.name if entry.is_dir() else entry.stem: _read(entry) for entry in _listed(self.path)}
        if not found:
            raise InvalidInputError(f"{self.path} holds no inputs: it needs image/, mask_image/, ...")
        several = {name: len(values) for name, values in found.items() if len(values) > 1}
        if len(set(several.values())) > 1:
            counts = ", ".join(f"{count} for {name}" for name, count in sorted(several.items()))
            raise InvalidInputError(
                f"{self.path} holds {counts}: those of one image belong together, so there must be equally many"
            )
        return found

    @cached_property
    def sha256(self) -> str:
        """Identity of all files.

        Raises:
            InvalidInputError: one is missing.
        """
        files = {path.relative_to(self.path).as_posix(): path for path in _files(self.path)}
        missing = next((path for path in files.values() if not path.is_file()), None)
        if missing is not None:
            raise InvalidInputError(f"{missing} is missing: it is a link to a file that is not there")
        return sha256_files(files)

    def lines(self, name: str) -> list[str] | None:
        """The texts for an argument, such as ``prompt``; None if there are none."""
        values = self.entries.get(name)
        return values if values is not None and isinstance(values[0], str) else None

    def check(self, images: Sequence[int]) -> None:
        """Look at every picture for some images.

        Raises:
            InvalidInputError: one is missing, broken or too large.
        """
        seen: set[Path] = set()
        for values in self.entries.values():
            for number in {image % len(values) for image in images}:
                value = values[number]
                for file in value if isinstance(value, list) else [value]:
                    if isinstance(file, Path) and file not in seen:
                        seen.add(file)
                        read_picture(file)

    def arguments(self, images: Sequence[int]) -> dict[str, Any]:
        """The pipeline's arguments for some images, by their numbers.

        A list for several; for a single one what belongs to it, since some pipelines take no lists.

        Raises:
            InvalidInputError: a picture is missing, broken or too large.
        """
        return {
            name: _together([_loaded(values[image % len(values)], name) for image in images])
            for name, values in self.entries.items()
        }


def read_picture(file: Path, mask: bool = False) -> Image:
    """A picture in RGB, turned as its camera says; a mask that is grey stays grey.

    Raises:
        InvalidInputError: it is missing, no picture, truncated, or has more than `LARGEST_PICTURE` pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                if opened.width * opened.height > LARGEST_PICTURE:
                    raise InvalidInputError(
                        f"{file} has {opened.width} x {opened.height} pixels, more than the "
                        f"{LARGEST_PICTURE // 2**20} million that a picture of inputs may have"
                    )
                grey = mask and opened.mode in ("1", "L")
                return ImageOps.exif_transpose(opened).convert("L" if grey else "RGB")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{file} is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"{file} is no picture that can be read: {error}") from error


def _listed(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """All files below a folder.

    Raises:
        InvalidInputError: there are more than `MOST_FILES`.
    """
    found: list[Path] = []
    for entry in _listed(folder):
        found += _files(entry) if entry.is_dir() else [entry]
        if len(found) > MOST_FILES:
            raise InvalidInputError(f"{folder} holds more than {MOST_FILES} files: is it a folder of inputs?")
    return found


def _read(entry: Path) -> list[Any]:
    suffix = entry.suffix.lower()
    if entry.is_dir():
        inside = _listed(entry)
        if not inside:
            raise InvalidInputError(f"{entry} is empty: it needs a picture for each image")
        return [_frames(part) if part.is_dir() else _picture(part) for part in inside]
    if suffix == ".txt":
        from qdeploy.model.prompts import read_prompts

        return list(read_prompts(entry, MOST_FILES))
    if suffix == ".safetensors":
        return _rows(entry)
    return [_picture(entry)]


def _frames(folder: Path) -> list[Path]:
    frames = [_picture(frame) for frame in _listed(folder)]
    if not frames:
        raise InvalidInputError(f"{folder} is empty: it needs the frames of a video")
    return frames


def _picture(file: Path) -> Path:
    if file.suffix.lower() not in PICTURES:
        raise InvalidInputError(
            f"{file} is no input of a known kind: pictures ({', '.join(PICTURES)}), folders of pictures, .txt with a "
            "line for each image and .safetensors with one tensor are"
        )
    return file


def _rows(file: Path) -> list[Any]:
    tensors = load_tensors(file)
    if len(tensors) != 1 or next(iter(tensors.values())).ndim < 2:
        raise InvalidInputError(f"{file} must hold one tensor with a row for each image")
    return list(next(iter(tensors.values())))


def _loaded(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [read_picture(file) for file in value]
    return read_picture(value, "mask" in name) if isinstance(value, Path) else value


def _together(values: list[Any]) -> Any:
    import torch

    if isinstance(values[0], torch.Tensor):
        rows: Tensor = torch.stack(values)
        return rows
    return values[0] if len(values) == 1 else values
