"""What lies on disk at each moment at which a process could be killed, or the power could fail.

All that counts is renamed into place, so the state of a folder changes at renames alone. `Moments` copies a folder
before each of them, and once at the end. A journalling file system may lose the last renames: that is an earlier
copy. It may also lose the content of files that were renamed before they were synced: in copies for the loss of
power such files are empty.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HOUR = 3600.0  # seconds
CLOCK = "seconds.json"  # how long work took: no step


class Moments:
    """Copies of a folder, in the order of time.

    Args:
        folder: whose files are renamed.
        copies: where the copies go.
        power: copies for the loss of power.
    """

    def __init__(self, folder: Path, copies: Path, power: bool = False) -> None:
        self.folder, self.copies, self.power = folder, copies, power
        self.found: list[Path] = []
        self.synced: set[tuple[int, int, int]] = set()
        self.synced_folders: list[int] = []

    def copy(self) -> None:
        """Copy the folder as it is now."""
        place = self.copies / str(len(self.found))
        shutil.copytree(self.folder, place)
        self.found.append(place)
        if self.power:
            for file in self.folder.rglob("*"):
                if file.is_file() and _state(os.stat(file)) not in self.synced:
                    (place / file.relative_to(self.folder)).write_bytes(b"")
        for file in place.rglob("*"):  # the next process comes an hour later: leases of this one are stale
            if file.is_file():
                stat = file.stat()
                os.utime(file, (stat.st_atime - HOUR, stat.st_mtime - HOUR))

    @contextmanager
    def watch(self) -> Iterator[Moments]:
        """Copy before each rename within the folder, and at the end. What lies there already is safe."""
        self.synced.update(_state(file.stat()) for file in self.folder.rglob("*"))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._copying(getattr(os, name)))
            patch.setattr(os, "fsync", self._noting(os.fsync))
            yield self
        self.copy()

    def _copying(self, rename: Any) -> Any:
        def copying(source: Any, target: Any, **options: Any) -> Any:
            if Path(target).is_relative_to(self.folder) and Path(target).name != CLOCK:
                self.copy()
            return rename(source, target, **options)

        return copying

    def _noting(self, fsync: Any) -> Any:
        def noting(number: int) -> None:
            fsync(number)
            self.synced.add(_state(os.fstat(number)))
            self.synced_folders.append(os.fstat(number).st_ino)

        return noting


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
