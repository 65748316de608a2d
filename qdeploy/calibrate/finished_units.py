"""What the units that are done compute for every row, kept in their place.

A stage that goes from unit to unit asks each time what comes to the next one. If the network ran through all units
before it again, one of U units would run U / 2 times over all rows. Here each unit runs once: what it computes is
kept for as long as a later unit reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qdeploy.calibrate.recorded_rows import RecordedRows, Recording, to_device
from qdeploy.network.observe import ModuleCall, observing, standing_in

DISK_SHARE = 0.5  # of what is free on the disk, for what one unit computes


class FinishedUnits:
    """Outputs of finished units, in one mode of the network.

    Units are asked for in the order of execution, and what runs before one has to stay as it is from then on.

    Args:
        units: units that a pass calls once, by path.
        readers: which units read what each of them returns (`qdeploy.network.readers.readers_of`).
        rows: how many there are.
        folder: of mapped files.
        budget: bytes that may be in memory.
        device: where outputs belong.
        half: keep them in float16.

    Attributes:
        kept: what is known, by unit.
        unread: one row of NaN for each unit that is done, and whose output no unit to come reads.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        readers: Mapping[str, set[str]],
        rows: int,
        folder: Path,
        budget: int,
        device: str = "cpu",
        *,
        half: bool = False,
    ) -> None:
        self.units, self.readers, self.rows = units, readers, rows
        self.folder, self.budget, self.device, self.half = folder, budget, device, half
        self.kept: dict[str, RecordedRows] = {}
        self.unread: dict[str, RecordedRows] = {}
        self._recordings: dict[str, Recording | None] = {}  # None where there is no room

    def knows(self, unit: str) -> bool:
        """Whether a unit is done."""
        return unit in self.kept or unit in self.unread

    def forget(self) -> None:
        """Forget everything: units are asked for anew."""
        self.kept, self.unread, self._recordings = {}, {}, {}

    @contextmanager
    def passing(self, unit: str, rows: Tensor) -> Iterator[None]:
        """Within, the network runs once over some rows, up to a unit: those that are done return what is known.

        As for every `Recording`, the first pass is of a few rows.
        """
        known = {path: module for path, module in self.units.items() if self.knows(path)}
        others = {path: module for path, module in self.units.items() if path != unit and path not in known}

        def output(path: str) -> Any:
            if path in self.kept:
                return to_device(self.kept[path].batch(rows), self.device)
            return to_device(self.unread[path].batch(torch.zeros_like(rows)), self.device)

        def after(call: ModuleCall) -> None:
            if call.name not in self._recordings:
                fits = self._fits(call.output, len(rows))
                recording = Recording(self.rows, self.folder, self._left(), half=self.half) if fits else None
                self._recordings[call.name] = recording
            if (recording := self._recordings[call.name]) is not None:
                recording.add(call.output, rows)

        with standing_in(known, output), observing(others, after=after):
            yield

    def passed(self) -> None:
        """All rows have passed: keep what new units computed, and no longer what only units read that are done."""
        for path, recording in self._recordings.items():
            if recording is not None and recording.whole:
                self.kept[path] = recording.result()
        self._recordings = {}
        for path in [path for path in self.kept if all(map(self.knows, self.readers[path]))]:
            self.unread[path] = self.kept.pop(path).unknown()

    def _fits(self, output: Any, rows: int) -> bool:
        """Whether there is room for outputs of all rows; without it a unit runs again in every pass."""
        seen = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        size = seen * self.rows // rows // (1 + self.half)
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return size <= max(self._left(), DISK_SHARE * disk_usage(place).free)

    def _left(self) -> int:
        """Bytes of memory that are left."""
        known = sum(rows.in_memory for rows in self.kept.values())
        begun = sum(recording.in_memory for recording in self._recordings.values() if recording is not None)
        return self.budget - known - begun
