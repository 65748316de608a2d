"""The folder in which an artifact is made: locked against other processes, on a disk with space left."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.estimate import readable_size

LEAST_SPACE = 4096  # bytes that have to be free before work starts


def lock_work(work: Path, output: Path, patience: float = 0) -> FileLock:
    """Make the folder of the work, and lock it.

    Args:
        work: the folder.
        output: the artifact, for messages.
        patience: seconds to wait for another process that has it; -1 for as long as it takes.

    Raises:
        UsageError: another process has it, it is a symbolic link, or it belongs to another user.
    """
    while True:
        if work.is_symlink():
            raise UsageError(f"{work} is a symbolic link, which qdeploy never makes: remove it")
        work.mkdir(exist_ok=True)
        if hasattr(os, "getuid") and work.stat().st_uid != os.getuid():
            raise UsageError(f"{work} belongs to another user: choose another output")
        lock = FileLock(work / "lock", timeout=patience)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"another process is writing {output}: wait for it or choose another output"
            ) from None
        if (work / "lock").exists():
            return lock
        lock.release()  # the process that had it has just removed the folder


def check_space(output: Path, needed: int) -> None:
    """Refuse to start on a disk that has less space left than an artifact takes.

    Raises:
        CapabilityError: it has.
    """
    needed, free = max(needed, LEAST_SPACE), shutil.disk_usage(output.parent).free
    if free < needed:
        raise CapabilityError(
            f"no space left for {output}: it takes about {readable_size(needed)}, and {readable_size(free)} are free"
        )


def is_full(output: Path) -> bool:
    """Whether the disk of ``output`` is full."""
    return shutil.disk_usage(output.parent).free < LEAST_SPACE


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Within, an error of a library on a full disk is an `OSError` that says so: each reports it in words of its own.

    Args:
        path: what is written, or a folder beside it.

    Raises:
        OSError: no space is left; looked at before temporary files are gone again.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if is_full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
