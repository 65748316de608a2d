"""A unit's inputs and outputs over the calibration rows, recorded to be run on again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import CurrentTimestep
from qdeploy.network.observe import ModuleCall, observing


@dataclass
class RecordedRows:
    """Tensors stored for many calibration rows, within a memory budget or else in a mapped file.

    Attributes:
        tensors: one [rows, ...] tensor for each recorded position.
        build: makes the call's or output's own structure out of a batch of them.
    """

    tensors: list[Tensor]
    build: Callable[[list[Tensor]], Any]

    def batch(self, rows: Tensor) -> Any:
        """The structure for some rows."""
        return self.build([tensor[rows] for tensor in self.tensors])


class _Stop(Exception):
    """Ends a forward pass once the unit has been reached."""


class UnitRecorder:
    """Records a unit's inputs or outputs over calibration rows.

    Args:
        denoiser: the network.
        load: returns the denoiser's inputs for some row numbers.
        rows: row numbers, in the order in which they are stored.
        batch: rows per forward pass.
        scratch: folder for mapped files.
        budget: bytes that may be held in memory; larger recordings go to a file.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        load: Callable[[Sequence[int]], dict[str, Tensor]],
        rows: Sequence[int],
        batch: int,
        scratch: Path,
        budget: int,
    ) -> None:
        self.denoiser, self.load, self.rows, self.batch = denoiser, load, rows, batch
        self.scratch, self.budget = scratch, budget
        self.recordings = 0

    def inputs(self, unit: nn.Module) -> RecordedRows:
        """Positional and keyword arguments of the unit's call."""
        return self._record(unit, "inputs")

    def outputs(self, unit: nn.Module) -> RecordedRows:
        """What the unit returns."""
        return self._record(unit, "outputs")

    def _record(self, unit: nn.Module, what: str) -> RecordedRows:
        self.recordings += 1
        stored: list[Tensor] = []
        kept: list[bool] = []
        constants: list[Any] = []
        spec: Any = None
        single: list[Any] | None = None
        for start, rows, seen in self._runs(unit, what):
            leaves, spec = tree_flatten(seen)
            if single is None:
                single = leaves
                continue
            if not kept:
                # A constant table may be as long as the batch too, but not one long when one row is given.
                pairs = zip(leaves, single, strict=True)
                kept = [_length(leaf) == rows and _length(alone) == 1 for leaf, alone in pairs]
                constants = [None if keep else leaf for leaf, keep in zip(leaves, kept, strict=True)]
                stored = self._allocate([leaf for leaf, keep in zip(leaves, kept, strict=True) if keep])
            tensors = [leaf for leaf, keep in zip(leaves, kept, strict=True) if keep]
            for store, tensor in zip(stored, tensors, strict=True):
                store[start : start + rows] = tensor.cpu()

        def build(tensors: list[Tensor]) -> Any:
            left = iter(tensors)
            leaves = [next(left) if keep else constants[i] for i, keep in enumerate(kept)]
            return tree_unflatten(leaves, spec)

        return RecordedRows(stored, build)

    def _runs(self, unit: nn.Module, what: str) -> Iterator[tuple[int, int, Any]]:
        """First row, number of rows and what was seen: of one row alone, then of each batch."""
        starts = range(0, len(self.rows), self.batch)
        batches = [(0, self.rows[:1]), *((start, self.rows[start : start + self.batch]) for start in starts)]
        seen: list[Any] = []

        def before(call: ModuleCall) -> None:
            if what == "inputs":
                seen.append((call.args, call.kwargs))
                raise _Stop

        def after(call: ModuleCall) -> None:
            seen.append(call.output)
            raise _Stop

        for start, rows in batches:
            assert not self.denoiser.training, "dropout must be off while activations are recorded"
            with observing({"unit": unit}, before, after), torch.no_grad(), suppress(_Stop):
                denoise(self.denoiser, self.load(rows))
            yield start, len(rows), seen.pop()

    def _allocate(self, tensors: list[Tensor]) -> list[Tensor]:
        shapes = [(len(self.rows), *tensor.shape[1:]) for tensor in tensors]
        sizes = [
            torch.Size(shape).numel() * tensor.element_size()
            for shape, tensor in zip(shapes, tensors, strict=True)
        ]
        if sum(sizes) <= self.budget:
            return [
                torch.empty(shape, dtype=tensor.dtype) for shape, tensor in zip(shapes, tensors, strict=True)
            ]
        stores = []
        self.scratch.mkdir(parents=True, exist_ok=True)
        for number, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
            file = self.scratch / f"{self.recordings}-{number}.bin"
            file.unlink(missing_ok=True)
            flat = torch.from_file(str(file), shared=True, size=torch.Size(shape).numel(), dtype=tensor.dtype)
            stores.append(flat.view(shape))
        return stores


def _length(leaf: Any) -> int | None:
    return len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None


@dataclass
class UnitRun:
    """A unit with recorded inputs, to be run on some of the rows."""

    unit: nn.Module
    inputs: RecordedRows
    device: str = "cpu"
    current_timestep: CurrentTimestep | None = None
    timesteps: Tensor | None = None

    def __call__(self, rows: Tensor) -> Any:
        """What the unit computes for some rows, by their places in the recording."""
        args, kwargs = to_device(self.inputs.batch(rows), self.device)
        known = self.current_timestep is not None and self.timesteps is not None
        running = self.current_timestep.at(self.timesteps[rows].to(self.device)) if known else nullcontext()  # type: ignore[union-attr,index]
        with running:
            return self.unit(*args, **kwargs)


def to_device(tree: Any, device: str) -> Any:
    """Tensors of a structure on a device."""
    leaves, spec = tree_flatten(tree)
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(moved, spec)


@contextmanager
def record_unit(
    recorder: UnitRecorder,
    unit: nn.Module,
    teacher: Callable[[], AbstractContextManager[None]],
    student: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[RecordedRows, RecordedRows]]:
    """A unit's student inputs and teacher outputs; files are removed at the end."""
    with teacher():
        targets = recorder.outputs(unit)
    with student():
        inputs = recorder.inputs(unit)
    with _cleared(recorder.scratch):
        yield inputs, targets


@contextmanager
def record_inputs(
    recorder: UnitRecorder, unit: nn.Module, *modes: Callable[[], AbstractContextManager[None]]
) -> Iterator[list[RecordedRows]]:
    """A unit's inputs in each of some modes of the network; files are removed at the end."""
    with _cleared(recorder.scratch):
        found = []
        for mode in modes:
            with mode():
                found.append(recorder.inputs(unit))
        yield found


@contextmanager
def _cleared(scratch: Path) -> Iterator[None]:
    """Recordings on disk are removed at the end."""
    try:
        yield
    finally:
        for file in scratch.glob("*.bin"):
            file.unlink()
