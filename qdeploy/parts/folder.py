"""The folder of a plan: ``plan.json``, and a folder of files with hashes for each finished part.

    plan.json          what is made, and from what: see `qdeploy.parts.plan`
    parts/000007/      the files of part 7, and part.json with their hashes
    claims/000007      a lease: some process is making part 7
    present/...        a lease for each process that makes or reads parts

A part appears by one rename of its folder. Nothing here needs a lock: whoever makes a part a second time makes the
same bytes, and the first rename wins.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qdeploy.parts.leases import Lease, is_alive, join, take
from qdeploy.parts.packed import unpack
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.files import explained_os_errors, sync
from qdeploy.store.work import full_disk_named
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_file
from qdeploy.system.progress import say

PLAN, PART = "plan.json", "part.json"
PATIENCE = 600.0  # seconds that a worker waits for storage that is away
_LOOK = 0.2  # seconds between two looks at it
# How the system says that storage is away, or was a moment ago.
AWAY = {
    *(errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
    *(errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET),
}


class PartFolder:
    """Finished parts of one plan. Use as a context manager while parts are made or read.

    Args:
        folder: of the plan.
        request: hash of what determines the parts.
        count: how many there are.
        output: what the work is for, in messages.
        planned: whether there is a plan, by which it is seen that the storage is there.
    """

    def __init__(
        self, folder: Path, request: str, count: int, output: Path | str, planned: bool = False
    ) -> None:
        self.folder, self.request, self.count, self.output = folder, request, count, Path(output)
        self.planned = planned
        self._lease: Lease | None = None
        self._done = False

    def __enter__(self) -> PartFolder:
        with explained_os_errors(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lease = join(self.folder / "present")
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lease is not None
        self._lease.__exit__(kind, error, trace)
        empty = not any(self.has(number) for number in range(self.count))
        if (self._done or (kind is not None and empty)) and not self.in_use():
            remove(self.folder)

    def done(self) -> None:
        """The result is there: the parts go when nobody is left who reads them."""
        self._done = True

    def forget(self) -> None:
        """Remove what a process that was killed at the very end has left: the result is there."""
        if self.folder.is_dir() and not self.in_use():
            remove(self.folder)

    def in_use(self) -> bool:
        """Whether some process makes or reads parts."""
        return any(is_alive(file) for file in (self.folder / "present").glob("[!.]*"))

    def there(self) -> bool:
        """Whether the plan can be seen: the storage of another machine may be away for a while."""
        try:
            return (self.folder / PLAN).is_file()
        except OSError:
            return False

    def wait_for_storage(self, error: Exception) -> None:
        """Wait until the plan can be seen again, `PATIENCE` seconds at most.

        Args:
            error: what has just failed; it is raised where there is no plan to wait for, or none lost.

        Raises:
            CapabilityError: the storage stays away.
        """
        cause = error if isinstance(error, OSError) else error.__cause__
        passing = isinstance(cause, OSError) and cause.errno in AWAY
        if not self.planned or (self.there() and not passing):
            raise error
        say(f"the storage of {self.folder} is away: waiting for it", level=2)
        end = time.monotonic() + PATIENCE
        while not self.there():
            if time.monotonic() > end:
                raise CapabilityError(
                    f"the storage of {self.folder} has been away for {PATIENCE:g} s: finished parts are kept there"
                ) from error
            time.sleep(_LOOK)

    # -- parts ---------------------------------------------------------------------------------------------

    def path(self, number: int) -> Path:
        """The folder of a part."""
        return self.folder / "parts" / f"{number:06d}"

    def has(self, number: int) -> bool:
        """Whether a part is there; `files` says whether it is as it was written."""
        try:
            return (self.path(number) / PART).is_file()
        except OSError:
            return False

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, in order."""
        return [number for number in range(self.count) if not self.has(number)]

    def claim(self, number: int) -> Lease | None:
        """The right to make a part; None while another process has it."""
        with explained_os_errors(self.output):
            return take(self.folder / "claims" / f"{number:06d}")

    def keep(self, number: int, make: Callable[[int, Path], None]) -> None:
        """Make a part.

        Args:
            number: of the part.
            make: fills a folder with the part's files.

        Raises:
            CapabilityError: no space is left.
            UsageError: the system refuses to write.
        """
        place = self.path(number)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        planned = self.there()
        with explained_os_errors(self.output):
            try:
                place.parent.mkdir(exist_ok=True)
                partial.mkdir()
                began = time.perf_counter()
                with full_disk_named(self.folder):
                    make(number, partial)
                took = round(time.perf_counter() - began, 3)
                hashes = {}
                for file in sorted(partial.iterdir()):
                    sync(file)
                    hashes[file.name] = sha256_file(file)
                described = {"request": self.request, "files": hashes, "seconds": took}
                (partial / PART).write_text(json.dumps(described))
                sync(partial / PART)
                if planned and not self.there():  # what was written is on another disk, below the mount
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(place))
                _appear(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                if planned and not self.there():
                    with suppress(OSError):  # empty folders, which would be in the storage's way
                        for folder in (place.parent, self.folder, self.folder.parent):
                            folder.rmdir()

    def accept(self, number: int, packed: BinaryIO) -> None:
        """Take a part that a machine without this disk has made, as `qdeploy.parts.packed` packs it.

        Raises:
            InvalidInputError: it is damaged, or belongs to another plan; then it is not kept.
            CapabilityError: no space is left.
            UsageError: the system refuses to write.
        """
        place = self.path(number)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        with explained_os_errors(self.output):
            try:
                partial.mkdir(parents=True)
                with full_disk_named(self.folder):
                    unpack(packed, partial)
                _appear(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        if self.files(number) is None:
            raise InvalidInputError(f"part {number} of {self.output} is not as it was written")

    def files(self, number: int) -> dict[str, Path] | None:
        """The files of a part by name; None, and no part, if they are not as they were written.

        Raises:
            InvalidInputError: the part belongs to another plan.
            UsageError: the storage is away.
        """
        place = self.path(number)
        try:
            described = read_json_object(place / PART)
            hashes: Mapping[str, str] = described["files"]
            foreign = described["request"] != self.request
            if not foreign and all(sha256_file(place / name) == sha256 for name, sha256 in hashes.items()):
                return {name: place / name for name in hashes}
        except (OSError, InvalidInputError, KeyError) as error:
            foreign = False
            if self.planned and not self.there():
                raise UsageError(
                    f"the storage of {self.folder} is away: run the same command again, finished parts are kept there"
                ) from error
        if foreign:
            raise InvalidInputError(
                f"{place} is a part of another plan: remove it, and run the same command again"
            )
        shutil.rmtree(place, ignore_errors=True)
        return None

    def seconds(self, numbers: Iterable[int] | None = None) -> float:
        """Seconds that some parts took, all by default, wherever they were made."""
        wanted = range(self.count) if numbers is None else numbers
        found = (read_json_object(self.path(number) / PART) for number in wanted if self.has(number))
        return round(sum(float(each.get("seconds", 0.0)) for each in found), 3)

    def each(self, make: Callable[[int, Path], None]) -> Iterator[dict[str, Path]]:
        """The files of all parts in order; a part that is missing or damaged is made first."""
        for number in range(self.count):
            found = self.files(number)
            while found is None:
                self.keep(number, make)
                found = self.files(number)
            yield found


def _appear(partial: Path, place: Path) -> None:
    """Give a part that is complete its name, unless another process was faster, with the same bytes."""
    try:
        partial.rename(place)
        sync(place.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def link(source: Path, target: Path) -> None:
    """The same file under another name where the file system can, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def parts_of(output: Path, request: str) -> Path:
    """The folder of the parts of an artifact: a hidden sibling, one for each request."""
    return output.parent / f".{output.name}.parts" / request[:32]


def check_alone(folder: Path, output: Path) -> None:
    """Remove unfinished parts that another request left for the same output.

    Raises:
        UsageError: another request for it is at work right now, or the folder is a symbolic link.
    """
    if folder.parent.is_symlink():
        raise UsageError(f"{folder.parent} is a symbolic link, which qdeploy never makes: remove it")
    for other in folder.parent.glob("[!.]*"):
        if other.name == folder.name:
            continue
        if PartFolder(other, "", 0, output).in_use():
            raise UsageError(
                f"another process is writing {output} from other inputs: wait for it or choose another output"
            )
        shutil.rmtree(other, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove the parts of a plan, and the hidden folder around those of an artifact if it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.name.startswith("."):
        with suppress(OSError):
            folder.parent.rmdir()
