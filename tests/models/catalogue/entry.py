"""Entries of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from PIL import Image

from tests.models.pipelines import saved, seeded

PROMPTS = ("a cat", "two dogs")

# A picture's size in pixels; a video's frames and size; or the shape of a tensor's rows.
Given = int | tuple[str, int, int] | tuple[int, ...]

ENTRIES: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    """A tiny pipeline.

    Attributes:
        name: class of the pipeline, with a word after it where there are several.
        make: the pipeline with random weights.
        options: how it is sampled, fields of `Sampling`.
        inputs: pictures and tensors that it needs, by argument.
    """

    name: str
    make: Callable[[], Any]
    options: Mapping[str, Any]
    inputs: Mapping[str, Given] = field(default_factory=dict)

    def write(self, folder: Path, inputs: Path | None = None) -> dict[str, Any]:
        """Write the pipeline to a folder, and its inputs to another one beside it.

        Args:
            folder: of the pipeline.
            inputs: folder of the inputs; beside the pipeline's by default.

        Returns:
            How to sample it.
        """
        with seeded(0):
            saved(self.make(), folder)
        if not self.inputs:
            return dict(self.options)
        place = inputs or folder.with_name(f"{folder.name}-inputs")
        write_inputs(place, self.inputs)
        return {**self.options, "inputs": place}


def tiny(
    name: str,
    prompts: tuple[str, ...] | None = PROMPTS,
    inputs: Mapping[str, Given] | None = None,
    **options: Any,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a function to the catalogue that makes a tiny pipeline.

    Args:
        name: class of the pipeline, with a word after it where there are several.
        prompts: None for a pipeline that takes none.
        inputs: pictures and tensors that it needs.
        options: further fields of `Sampling`.
    """

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        given = {"prompts": prompts, **options} if prompts else options
        ENTRIES[name] = Entry(name, make, given, inputs or {})
        return make

    return add


def loaded(write: Callable[[Path], Path]) -> Any:
    """The pipeline that a function of `tests.models` writes."""
    import diffusers

    with TemporaryDirectory() as scratch:
        write(Path(scratch) / "model")
        diffusers.utils.logging.disable_progress_bar()
        return diffusers.DiffusionPipeline.from_pretrained(Path(scratch) / "model")


def variant(name: str, write: Callable[[Path], Path], **components: Any) -> Any:
    """A pipeline of another class with the components of one that a function of `tests.models` writes."""
    import diffusers

    kind = getattr(diffusers, name)
    known = {key: part for key, part in loaded(write).components.items() if key in signature(kind).parameters}
    return kind(**{**known, **components})


def without_zeros(network: Any) -> Any:
    """A network of hints with random weights throughout: its last layers are zero at first, as if there were none."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return network


def write_inputs(folder: Path, inputs: Mapping[str, Given], count: int = 2) -> Path:
    """Write ``count`` of each input."""
    from safetensors.torch import save_file

    draw = numpy.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, given in inputs.items():
        if isinstance(given, tuple) and given[0] != "video":
            generator = torch.Generator().manual_seed(0)
            save_file({name: torch.randn(count, *given, generator=generator)}, folder / f"{name}.safetensors")
            continue
        for number in range(count):
            frames, size = (given[1], given[2]) if isinstance(given, tuple) else (1, given)
            for frame in range(frames):
                pixels = draw.integers(0, 256, (size, size, 3), dtype=numpy.uint8)
                if "mask" in name:
                    pixels[:] = numpy.where(numpy.arange(size)[:, None, None] < size // 2, 255, 0)
                place = (
                    folder / name / (f"{number}/{frame}.png" if isinstance(given, tuple) else f"{number}.png")
                )
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place)
    return folder
