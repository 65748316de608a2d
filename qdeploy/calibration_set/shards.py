"""Shards of a calibration set: how recorded denoiser inputs lie on disk.

A shard ``rows-00000.safetensors`` holds one batch of images. A row is one denoiser input; rows are ordered by
call, then by branch, then by image, then conditional before unconditional. ``NAME`` is an input's flat name, as in
`qdeploy.model.call`.

    input.SAMPLE      [rows, ...]      the noisy sample, named as the first parameter of ``forward``
    input.timestep    [rows]           t as the network was given it, in its own dtype
    input.NAME        [rows, ...]      any other input that changes from call to call
    condition.NAME    [distinct, ...]  an input that stays the same along the trajectory, each value once
    condition_row     [rows] int64     where in ``condition.*`` a row finds its conditions
    shared.NAME       as given         an input that has no batch dimension and never changes
    image             [rows] int64     number of the image, counted through the whole set
    call              [rows] int64     number of the trajectory's step that called the denoiser, from 0
    branch            [rows] int64     which call of that step it was, from 0; missing where each makes one
    conditional       [rows] bool      under classifier-free guidance, which of the two branches a row is from

Under guidance in one call two neighbouring rows share image, sample and t. ``conditional`` is missing if there is no
guidance, or if it is unknown which half is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qdeploy.store.data_facts import CalibrationSetFacts, InputFacts
from qdeploy.system.errors import InvalidInputError

TIMESTEP_DTYPES = (torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = {
    "image": torch.int64,
    "call": torch.int64,
    "branch": torch.int64,
    "condition_row": torch.int64,
    "conditional": torch.bool,
}
_CHUNK = 2**20  # elements looked at in one go, so that a check takes little memory


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"rows-{number:05d}.safetensors"


def finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and Inf, in little memory."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    starts = range(0, len(flat), _CHUNK)
    return all(bool(torch.isfinite(flat[start : start + _CHUNK]).all()) for start in starts)


class Shard:
    """A shard on disk. Its tensors are memory-mapped: only what is indexed is read.

    Raises:
        InvalidInputError: it is no safetensors file, lacks a tensor or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = cast(Any, safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise InvalidInputError(f"{path} is damaged: {error}") from error
        self.names = frozenset(self._file.keys())
        missing = {"input.timestep", "image", "call"} - self.names
        if any(name.startswith("condition.") for name in self.names):
            missing |= {"condition_row"} - self.names
        if missing:
            lacking = sorted(missing)[0]
            raise InvalidInputError(f"{path} is no shard of a calibration set: it lacks {lacking!r}")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def tensor(self, name: str) -> Tensor:
        """A tensor, not yet read."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        shape = self._file.get_slice("input.timestep").get_shape()
        return int(shape[0]) if shape else 0

    def layout(self) -> dict[str, dict[str, Any]]:
        """Name, dtype and shape of each denoiser input; the shape without the batch dimension."""
        described = {}
        for full in sorted(self.names):
            group, _, name = full.partition(".")
            if group in ("input", "condition", "shared"):
                tensor, shared = self.tensor(full), group == "shared"
                described[name] = {
                    "name": name,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape if shared else tensor.shape[1:]),
                    "shared": shared,
                }
        return described

    def check(self) -> None:
        """Look at every number once.

        Raises:
            InvalidInputError: wrong dtypes, different numbers of rows, NaN or Inf.
        """
        timesteps = self.tensor("input.timestep")
        if timesteps.dtype not in TIMESTEP_DTYPES:
            raise InvalidInputError(
                f"{self.path} holds timesteps of {timesteps.dtype}: int64, int32 or float is needed"
            )
        if timesteps.ndim != 1:
            shape = list(timesteps.shape)
            raise InvalidInputError(f"{self.path} holds timesteps of shape {shape}, not one per row")
        distinct = 0
        for name in sorted(self.names):
            tensor, group = self.tensor(name), name.partition(".")[0]
            if not finite(tensor):
                raise InvalidInputError(f"{self.path} holds NaN or Inf in {name!r}")
            if group == "condition":
                distinct = distinct or len(tensor)
            expected = {"shared": None, "condition": distinct}.get(group, len(timesteps))
            if expected is not None and (tensor.ndim == 0 or len(tensor) != expected):
                raise InvalidInputError(f"{self.path} contradicts itself: {name!r} has not {expected} rows")
        for name, dtype in _INDEX_DTYPES.items():
            if name in self and (found := self.tensor(name).dtype) != dtype:
                raise InvalidInputError(f"{self.path} holds {name!r} as {found} instead of {dtype}")
        if "condition_row" in self and len(timesteps):
            rows = self.tensor("condition_row")
            if not 0 <= int(rows.min()) <= int(rows.max()) < distinct:
                raise InvalidInputError(f"{self.path} contradicts itself: 'condition_row' points nowhere")


def open_shards(folder: Path, files: Sequence[Path]) -> list[Shard]:
    """The shards of a calibration set, each checked, all with the same inputs.

    Args:
        folder: the set, for messages.
        files: its shards.

    Raises:
        InvalidInputError: there are none, one is broken, or they do not fit together.
    """
    shards = [Shard(path) for path in files]
    if not sum(shard.rows for shard in shards):
        raise InvalidInputError(f"the calibration set {folder} is empty")
    for shard in shards:
        shard.check()
        if shard.layout() != shards[0].layout() or ("conditional" in shard) != ("conditional" in shards[0]):
            raise InvalidInputError(
                f"the shards {shards[0].path.name} and {shard.path.name} of {folder} do not fit together: "
                "their inputs differ in name, dtype or shape"
            )
    return shards


def shard_files(folder: Path) -> list[Path]:
    """The shards of a set that is being made, in order."""
    return sorted(folder.glob("rows-*.safetensors"))


def describe(
    shards: Sequence[Shard],
    sample: str,
    *,
    scheduler: str | None,
    inference_steps: int,
    guidance: float | None,
    **more: Any,
) -> CalibrationSetFacts:
    """The facts of a set: those that follow from its shards, and how they were sampled."""
    timesteps, images, calls = (
        sorted({number for shard in shards for number in shard.tensor(name).tolist()})
        for name in ("input.timestep", "image", "call")
    )
    rows = sum(shard.rows for shard in shards)
    pairs: Literal["known", "undecided"] | None = "undecided" if rows > len(images) * len(calls) else None
    return CalibrationSetFacts(
        sample=sample,
        inputs=[InputFacts(**form) for form in shards[0].layout().values()],
        rows=rows,
        images=len(images),
        steps=len(calls),
        timesteps=timesteps,
        pairs="known" if "conditional" in shards[0] else pairs,
        scheduler=scheduler,
        inference_steps=inference_steps,
        guidance=guidance,
        **more,
    )
