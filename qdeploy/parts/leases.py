"""Leases: files that say that a process is at work, and that go stale when it is gone.

A lease says nothing about who is right: a part may be made twice, with the same bytes. It only keeps processes from
doing the same work at the same time, and from removing what another one still reads.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a process counts as gone


class Lease:
    """A file that this process keeps fresh. Use as a context manager.

    Args:
        file: of the lease; it exists already.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Lease:
        _heart.add(self.file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _heart.remove(self.file)
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


def take(file: Path) -> Lease | None:
    """The lease of a name, for one process at a time; None while another one is alive."""
    file.parent.mkdir(exist_ok=True)  # and no more: storage that is away must not be made anew beside it
    for _ in range(2):
        with _taking:
            try:
                with file.open("x") as stream:
                    stream.write(f"{socket.gethostname()} {os.getpid()}")
                _heart.add(file)
                return Lease(file)
            except FileExistsError:
                if is_alive(file) and not _was_left(file):
                    return None
                file.unlink(missing_ok=True)
    return None


def _was_left(file: Path) -> bool:
    """Whether this very process gave a lease up, and could not remove it since storage was away."""
    try:
        return file.read_text().split() == [socket.gethostname(), str(os.getpid())] and file not in _heart
    except FileNotFoundError:
        return False


def join(folder: Path) -> Lease:
    """A lease beside those of other processes in a folder."""
    lease = take(folder / uuid.uuid4().hex)
    assert lease is not None
    return lease


def is_alive(file: Path) -> bool:
    """Whether the process that holds a lease is still there, by its last sign of life.

    The present is read from the same file system, so that clocks of machines need not agree.
    """
    try:
        beaten, holder = file.stat().st_mtime, file.read_text().split()
    except FileNotFoundError:
        return False
    # A file without a holder is being written, or is what a loss of power has left.
    if len(holder) == 2 and holder[0] == socket.gethostname() and not _exists(int(holder[1])):
        return False
    now = file.with_name(f".{uuid.uuid4().hex}")
    try:
        now.touch()
        return now.stat().st_mtime - beaten < STALE
    finally:
        now.unlink(missing_ok=True)


def _exists(process: int) -> bool:
    """Whether a process of this machine is there; where that cannot be told without harm (Windows), it is."""
    if not hasattr(os, "getuid"):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Heart:
    """One thread that gives signs of life for all leases of the process."""

    def __init__(self) -> None:
        self._files: set[Path] = set()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, file: Path) -> None:
        with self._guard:
            self._files.add(file)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, daemon=True, name="qdeploy-leases")
                self._thread.start()

    def __contains__(self, file: Path) -> bool:
        with self._guard:
            return file in self._files

    def remove(self, file: Path) -> None:
        with self._guard:
            self._files.discard(file)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT):
            with self._guard:
                files = list(self._files)
            for file in files:
                with suppress(OSError):  # storage may be away for a while: the lease goes stale, and no more
                    os.utime(file)


_heart = _Heart()
_taking = threading.Lock()  # of leases, by the threads of this process
