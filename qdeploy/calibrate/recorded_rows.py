"""Tensors of many calibration rows, gathered batch by batch: within a memory budget, or else in mapped files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import frexp, prod
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Float16 holds values below 2 ** 16. Those of the first batch are brought below 2 ** 10: later ones may be larger.
HALF_TOP, HALF_LIMIT = 10, 15


@dataclass
class RecordedRows:
    """What calls of a module were given, or returned, for all rows.

    Attributes:
        tensors: one tensor for each recorded position: [rows, ...], or [rows, n, ...] of those that hold n entries of
            the first axis for each row, such as the frames of a film.
        entries: n, for each of them.
        build: makes the call's or output's own structure out of a batch of them.
        shifts: the power of two that those kept in float16 are multiplied with; None for the others. Empty if all are
            kept as they are.
    """

    tensors: list[Tensor]
    entries: list[int]
    build: Callable[[list[Tensor]], Any]
    shifts: Sequence[int | None] = ()

    def batch(self, rows: Tensor) -> Any:
        """The structure for some rows, by their numbers; a copy, its axes in memory as they were.

        A convolution rounds otherwise for another order of axes.
        """
        batches = [_chosen(tensor, rows) for tensor in self.tensors]
        for place, shift in enumerate(self.shifts):
            if shift is not None:
                batches[place] = batches[place].float() * 2.0**-shift
        flat = [
            batch.flatten(0, 1) if entries > 1 else batch
            for batch, entries in zip(batches, self.entries, strict=True)
        ]
        return self.build(flat)

    def unknown(self) -> RecordedRows:
        """One row like these, of NaN: what must not be read any more."""
        unknown = [_nan_like(tensor[:1]) for tensor in self.tensors]
        return RecordedRows(unknown, self.entries, self.build, self.shifts)

    @property
    def in_memory(self) -> int:
        """Bytes that are not in mapped files."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.untyped_storage().filename is None)


@dataclass
class _Store:
    """Where the rows of one tensor go.

    Attributes:
        values: [rows, ...].
        shift: as in `RecordedRows.shifts`.
    """

    values: Tensor
    shift: int | None

    def write(self, rows: Tensor, tensor: Tensor) -> None:
        """Put some rows in, by their numbers."""
        if self.shift is not None:
            if (exponent := _exponent(tensor)) + self.shift > HALF_LIMIT:
                lower = HALF_TOP - exponent
                self.values.mul_(2.0 ** (lower - self.shift))
                self.shift = lower
            tensor = (tensor * 2.0**self.shift).half()
        self.values[rows] = tensor.cpu()


class Recording:
    """Gathers what is seen of a few rows first, then of batch after batch.

    Those few, another number than that of a batch, tell which tensors hold rows: a table may be as long as the batch
    too, but not with both numbers.

    Args:
        rows: how many there will be.
        folder: of mapped files.
        budget: bytes that may be in memory.
        half: keep float32 in float16, each tensor times a power of two.
    """

    def __init__(self, rows: int, folder: Path, budget: int, *, half: bool = False) -> None:
        self.rows, self.folder, self.budget, self.half = rows, folder, budget, half
        self.few: list[Any] | None = None
        self.few_rows = 0
        self.stores: list[_Store] = []
        self.entries: list[int] = []  # of each leaf for each row; 0 for a constant
        self.constants: list[Any] = []
        self.spec: Any = None

    def add(self, seen: Any, rows: Tensor) -> None:
        """Take what was seen of some rows, by their numbers; the first time, of the few."""
        leaves, self.spec = tree_flatten(seen)
        if self.few is None:
            self.few, self.few_rows = leaves, len(rows)
            return
        if not self.entries:
            pairs = zip(self.few, leaves, strict=True)
            self.entries = [_entries(few, self.few_rows, leaf, len(rows)) for few, leaf in pairs]
            self.constants = [
                None if entries else leaf for leaf, entries in zip(leaves, self.entries, strict=True)
            ]
            self.stores = self._allocated(self._own(leaves, len(rows)))
        for store, tensor in zip(self.stores, self._own(leaves, len(rows)), strict=True):
            store.write(rows, tensor)

    def _own(self, leaves: list[Any], rows: int) -> list[Tensor]:
        """The leaves that hold rows, as they are stored."""
        pairs = [(leaf, entries) for leaf, entries in zip(leaves, self.entries, strict=True) if entries]
        return [leaf.unflatten(0, (rows, entries)) if entries > 1 else leaf for leaf, entries in pairs]

    @property
    def whole(self) -> bool:
        """Whether all numbers that were seen belong to rows."""
        return not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in self.constants)

    @property
    def in_memory(self) -> int:
        """Bytes that it takes up so far, those of mapped files aside."""
        return self.result().in_memory

    def result(self) -> RecordedRows:
        """What was gathered."""
        entries, constants, spec = self.entries, self.constants, self.spec

        def build(tensors: list[Tensor]) -> Any:
            left = iter(tensors)
            leaves = [
                next(left) if count else constant for count, constant in zip(entries, constants, strict=True)
            ]
            return tree_unflatten(leaves, spec)

        return RecordedRows(
            [store.values for store in self.stores],
            [count for count in entries if count],
            build,
            [store.shift for store in self.stores],
        )

    def _allocated(self, tensors: list[Tensor]) -> list[_Store]:
        shapes = [(self.rows, *tensor.shape[1:]) for tensor in tensors]
        halved = [self.half and tensor.dtype == torch.float32 for tensor in tensors]
        kinds = [
            torch.float16 if half else tensor.dtype for tensor, half in zip(tensors, halved, strict=True)
        ]
        total = sum(prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True))
        make = torch.empty if total <= self.budget else self._mapped
        stores = []
        for shape, tensor, kind, half in zip(shapes, tensors, kinds, halved, strict=True):
            order = _order(tensor)
            values = make(tuple(shape[axis] for axis in order), dtype=kind)
            shift = HALF_TOP - _exponent(tensor) if half else None
            stores.append(_Store(values.permute(_inverse(order)), shift))
        return stores

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a file that has no name any more: its space is free again once the tensor is gone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        opened, name = mkstemp(suffix=".bin", dir=self.folder)
        with os.fdopen(opened, "r+b") as file:
            if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, and not a crash later
                os.posix_fallocate(file.fileno(), 0, max(1, prod(shape) * dtype.itemsize))
        tensor = torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        with suppress(PermissionError):  # where a file in use keeps its name, it goes with the folder
            Path(name).unlink()
        return tensor


def _entries(few: Any, few_rows: int, leaf: Any, rows: int) -> int:
    """How many entries of its first axis belong to each row; 0 for what does not depend on rows."""
    if not (isinstance(few, Tensor) and isinstance(leaf, Tensor) and few.ndim and leaf.ndim):
        return 0
    entries, rest = divmod(len(leaf), rows)
    return entries if not rest and len(few) == entries * few_rows else 0


def _exponent(tensor: Tensor) -> int:
    """The least e such that all finite values are below ``2**e``."""
    largest = tensor.abs().nan_to_num(0, 0).amax() if tensor.numel() else torch.zeros(())
    return frexp(float(largest))[1]


def _order(tensor: Tensor) -> list[int]:
    """The axes as they lie in memory, rows outermost."""
    return [0, *sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _chosen(tensor: Tensor, rows: Tensor) -> Tensor:
    order = _order(tensor)
    return tensor.permute(order)[rows].permute(_inverse(order))


def _nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor.clone()


def to_device(tree: Any, device: str) -> Any:
    """Tensors of a structure on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
