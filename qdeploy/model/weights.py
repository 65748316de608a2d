"""Which weight files of a component diffusers would load, and how their tensors are read.

A folder can hold several sets of weights of one network: a single file or shards that an index lists, and the same
again for every variant (``fp16``, ``bf16``, ``non_ema``, ...):

    diffusion_pytorch_model.safetensors                one file
    diffusion_pytorch_model.safetensors.index.json     shards: the file of every tensor
    diffusion_pytorch_model.VARIANT.safetensors        one file of a variant
    diffusion_pytorch_model.safetensors.index.VARIANT.json

Diffusers takes the index before the single file, and no variant unless one is requested. The same is done here,
and what is not read is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.store.tensors import open_tensors
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one network.

    Attributes:
        files: those that hold the weights, sorted by name.
        variant: the variant they belong to; None for the plain ones.
        unread: other weight files of the folder, which are not read.
    """

    files: tuple[Path, ...]
    variant: str | None
    unread: tuple[Path, ...] = ()


def find_weights(folder: Path, variant: str | None = None, base: str = DIFFUSERS) -> WeightFiles:
    """The files that diffusers loads a network from.

    Args:
        folder: the component's folder.
        variant: the variant to load. By default the plain weights are, or else the only variant there is.
        base: how names of weight files begin: `DIFFUSERS`, or `TRANSFORMERS` for text encoders.

    Raises:
        InvalidInputError: there are no safetensors weights, or not of that variant; there are several variants, no
            plain weights, and none was chosen; or an index is damaged or names a file that is not there.
    """
    sets = _sets(folder, base)
    if not sets:
        raise InvalidInputError(_why_none(folder, base))
    if variant is None and None not in sets:
        if len(sets) > 1:
            names = sorted(name for name in sets if name)
            raise InvalidInputError(
                f"{folder} holds its weights in the variants {', '.join(names)}, and none without a variant: "
                f"choose one by writing @{names[0]} after the model's name"
            )
        variant = next(iter(sets))
    if variant not in sets:
        there = ", ".join(name or "the plain one" for name in sorted(sets, key=lambda name: name or ""))
        raise InvalidInputError(f"{folder} has no weights of the variant {variant!r}, but of {there}")
    files = _shards(sets[variant]) if sets[variant].suffix == ".json" else [sets[variant]]
    unread = sorted(set(folder.glob(f"{base}*.safetensors")) - set(files))
    return WeightFiles(tuple(files), variant, tuple(unread))


def variants_needed(path: Path, components: Sequence[str], chosen: str | None = None) -> set[str]:
    """The variants without which some component of a pipeline cannot be loaded.

    Args:
        path: the pipeline's folder.
        components: names of its components.
        chosen: the variant to take of components that have several and no plain weights.
    """
    needed = set()
    for name in components:
        for base in (DIFFUSERS, TRANSFORMERS):
            variants = {variant for variant in _sets(path / name, base) if variant}
            if variants and None not in _sets(path / name, base):
                needed |= {chosen} if chosen in variants else variants
    return {variant for variant in needed if variant}


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of safetensors files, one after the other; a tensor is read when it is used.

    On a CPU a tensor stays in its file, mapped into memory.

    Raises:
        InvalidInputError: a file is truncated or no safetensors file.
    """
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def stored_types(files: Sequence[Path]) -> list[str]:
    """The types that weights are stored in, such as ``BF16``, as safetensors names them; sorted.

    Raises:
        InvalidInputError: a file is truncated or no safetensors file.
    """
    types: set[str] = set()
    for file in files:
        with open_tensors(file) as opened:
            types |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return sorted(types)


def _sets(folder: Path, base: str) -> dict[str | None, Path]:
    """For every variant the file that its weights are loaded through: an index, or else the weights."""
    single = re.compile(rf"{re.escape(base)}(?:\.(?P<variant>[\w-]+))?\.safetensors")
    index = re.compile(rf"{re.escape(base)}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
    shard = re.compile(r".*-\d{5}-of-\d{5}")
    found: dict[str | None, Path] = {}
    for pattern in (single, index):  # an index is taken before a single file
        for file in sorted(folder.glob(f"{base}*")):
            matched = pattern.fullmatch(file.name)
            if matched and not shard.fullmatch(file.name.removesuffix(".safetensors")):
                found[matched["variant"]] = file
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{index} is no index of weight files: it has no weight_map") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidInputError(f"{index} names {name!r}, which is no file of its own folder")
        if not (index.parent / name).is_file():
            raise InvalidInputError(f"{index} names {name}, which is missing: the download is not complete")
    return [index.parent / name for name in names]


def _why_none(folder: Path, base: str) -> str:
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    shards = sorted(folder.glob(f"{base}*-of-*.safetensors"))
    if shards:
        return (
            f"{folder} holds shards such as {shards[0].name} without the index that lists their tensors, "
            f"{base}.safetensors.index.json: download it too"
        )
    if pickles:
        return (
            f"{folder} holds its weights as {pickles[0]} alone, a pickle, which can run code when it is read: load "
            "the pipeline with diffusers if you trust it, and save it with save_pretrained(..., "
            "safe_serialization=True)"
        )
    return f"{folder} holds no {base}*.safetensors weights"
