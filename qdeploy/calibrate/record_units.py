"""A unit's inputs and outputs over the calibration rows, recorded to be run on again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibrate.finished_units import FinishedUnits
from qdeploy.calibrate.recorded_rows import RecordedRows, Recording, to_device
from qdeploy.model.inputs import denoise
from qdeploy.network.current_timestep import CurrentTimestep
from qdeploy.network.observe import ModuleCall, observing


class _Stop(Exception):
    """Ends a forward pass once the unit has been reached."""


class UnitRecorder:
    """Records units' inputs or outputs over calibration rows.

    Args:
        denoiser: the network.
        load: returns the denoiser's inputs for some row numbers.
        rows: row numbers, in the order in which they are stored.
        batch: rows per forward pass.
        scratch: folder for mapped files.
        budget: bytes that a recording may take in memory; a larger one goes to a file.
        finished: keeps what passes went through, so that they begin behind it; None lets each begin at the start.
        half: record in float16.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        load: Callable[[Sequence[int]], dict[str, Tensor]],
        rows: Sequence[int],
        batch: int,
        scratch: Path,
        budget: int,
        finished: FinishedUnits | None = None,
        *,
        half: bool = False,
    ) -> None:
        self.denoiser, self.load, self.rows, self.batch = denoiser, load, rows, batch
        self.scratch, self.budget, self.finished, self.half = scratch, budget, finished, half

    def inputs(self, unit: str) -> RecordedRows:
        """Positional and keyword arguments of the unit's call."""
        if self.finished is not None and self.finished.knows(unit):
            self.finished.forget()  # it is asked for again, so that it or what is before it may have changed

        def before(call: ModuleCall) -> None:
            seen.append((call.args, call.kwargs))
            raise _Stop

        seen: list[Any] = []
        return self._gathered(unit, seen, before=before)

    def outputs(self, unit: str) -> RecordedRows:
        """What the unit returns; with `finished`, it has to be done."""
        if self.finished is not None:
            if unit in self.finished.kept:
                return self.finished.kept[unit]
            if self.finished.knows(unit):
                self.finished.forget()

        def after(call: ModuleCall) -> None:
            seen.append(call.output)
            raise _Stop

        seen: list[Any] = []
        found = self._gathered(unit, seen, after=after)
        if self.finished is not None:
            self.finished.kept[unit] = found
        return found

    def _gathered(self, unit: str, seen: list[Any], **hooks: Callable[[ModuleCall], None]) -> RecordedRows:
        """What hooks of the unit append to ``seen``: of a few rows, then of each batch."""
        numbers = torch.arange(len(self.rows))
        first, *others = numbers.split(self.batch)
        few = numbers[:1].repeat(2 if len(first) == 1 else 1)
        recording = Recording(len(self.rows), self.scratch, self.budget, half=self.half)
        watched = {unit: self.denoiser.get_submodule(unit)}
        for chosen in (few, first, *others):
            assert not self.denoiser.training, "dropout must be off while activations are recorded"
            known = self.finished.passing(unit, chosen) if self.finished else nullcontext()
            with known, observing(watched, **hooks), torch.no_grad(), suppress(_Stop):
                denoise(self.denoiser, self.load([self.rows[number] for number in chosen.tolist()]))
            recording.add(seen.pop(), chosen)
        if self.finished is not None:
            self.finished.passed()
        return recording.result()


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
