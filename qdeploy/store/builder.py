"""Artifacts while they are made: locked, journalled, and renamed into place when whole.

While it is being made, an artifact lives in a hidden sibling, ``.NAME.work``. Finished steps stay there
after an interruption and are found again, with their hashes, by the next run of the same request. One rename makes
the artifact appear, so a folder that exists is complete. An artifact that is replaced is moved into the folder of
the work first; the next run puts it back if that was interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec
from filelock import FileLock

from qdeploy.store.artifact import Artifact, described, verified
from qdeploy.store.facts import Facts
from qdeploy.store.files import copy_file, explained_os_errors, sync, sync_below, write_json, write_text
from qdeploy.store.journal import Journal, WorkTime
from qdeploy.store.manifest import (
    IDENTITY,
    MANIFEST,
    SCHEMA,
    Manifest,
    Notes,
    is_artifact,
    read_manifest,
    typed,
)
from qdeploy.store.measured import Measured
from qdeploy.store.work import check_space, is_full, lock_work
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import canonical, sha256_file, sha256_of
from qdeploy.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

_A = TypeVar("_A", bound=Artifact)
_T = TypeVar("_T")


@dataclass
class Draft(Generic[_A]):
    """An artifact that is being made. Use as a context manager; `finish` makes it appear.

    Args:
        output: path of the finished artifact.
        kind: class of the artifact, such as `qdeploy.store.artifact.Checkpoint`.
        made_from: hashes of the inputs, by name.
        recipe: the resolved recipe, if any.
        seed: the seed that all randomness of the stage derives from.
        options: what else determines the result; together with the above it names the request, and
            only the same request takes up unfinished work or accepts a finished artifact.
        overwrite: replace an artifact that another request left at ``output``.
        space: bytes that the artifact takes on disk, as far as that is known before.
        patience: seconds to wait for another process that is writing the same artifact; -1 for as long as it takes.

    Raises:
        UsageError: ``output`` exists and was not made by this request, or cannot be written.
    """

    output: Path
    kind: type[_A]
    made_from: Mapping[str, str]
    recipe: Mapping[str, Any] | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    space: int = 0
    patience: float = 0

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self.work = self.output.parent / f".{self.output.name}.work"
        self.content = self.work / "content"
        self.steps = self.work / "steps"
        self.journal = Journal(self.work)
        self.started = time.perf_counter()
        self.time: WorkTime | None = None
        self.request = sha256_of(
            {
                "kind": self.kind.KIND,
                "version": __version__,
                "made_from": dict(self.made_from),
                "recipe": self.recipe,
                "seed": self.seed,
                "options": dict(self.options),
            }
        )
        self._lock: FileLock | None = None

    def finished(self) -> _A | None:
        """The artifact, if this very request has already been carried out.

        Raises:
            UsageError: there is something else at ``output``, or it is a symbolic link.
        """
        if self.output.is_symlink():
            raise UsageError(f"{self.output} is a symbolic link: name the folder that it leads to")
        self._put_back()
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        try:
            if is_artifact(self.output) and read_manifest(self.output).request == self.request:
                done = cast(_A, verified(self.output, self.kind))
                shutil.rmtree(self.work, ignore_errors=True)
                return done
        except InvalidInputError:
            if not self.overwrite:  # what is damaged can be made again
                raise
        if self.overwrite and is_artifact(self.output):
            return None
        what = "holds another artifact" if is_artifact(self.output) else "already exists"
        raise UsageError(
            f"{self.output} {what}: choose another output"
            + (", or pass --overwrite to replace it" if is_artifact(self.output) else "")
        )

    def __enter__(self) -> Draft[_A]:
        with explained_os_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_work(self.work, self.output, self.patience)
            self._put_back()
            check_space(self.output, self.space)
            request = self.work / "request"
            if not request.exists() or request.read_text() != self.request:
                for stale in (self.content, self.steps, self.journal.hashes):
                    shutil.rmtree(stale, ignore_errors=True)
                (self.work / "seconds.json").unlink(missing_ok=True)
                write_text(request, self.request)
            for folder in (self.content, self.steps, self.journal.hashes):
                folder.mkdir(exist_ok=True)
                for partial in folder.rglob(".*"):  # half-written by a process that was killed
                    partial.unlink()
            self.time = WorkTime(self.work / "seconds.json")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = not any(self.steps.glob("*")) and not any(self.content.rglob("*.safetensors"))
        full = error is not None and is_full(self.output)
        if self.time is not None and self.work.exists() and kind is not None:
            with suppress(OSError):
                self.time.lap()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if kind is not None and self.work.exists() and empty:
            shutil.rmtree(self.work, ignore_errors=True)
        if isinstance(error, OSError):
            with explained_os_errors(self.output):
                raise error
        if full and isinstance(error, Exception):  # runtimes report a full disk in words of their own
            with explained_os_errors(self.output):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def _put_back(self) -> None:
        """Restore the artifact that an interrupted replacement has moved away."""
        replaced = self.work / "replaced"
        if is_artifact(replaced) and not self.output.exists():
            with explained_os_errors(self.output):
                os.rename(replaced, self.output)

    def step(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a named step of the work: computed once, then found again after a stop."""
        return self._once(self.steps / f"{name}.safetensors", compute)

    def step_with_value(
        self, name: str, compute: Callable[[], tuple[dict[str, Tensor], _T]]
    ) -> tuple[dict[str, Tensor], _T]:
        """As `step`, for a step that also has a JSON value as its result."""
        file, value = self.steps / f"{name}.safetensors", self.steps / f"{name}.json"
        if self.journal.has(value) and (found := self.journal.tensors(file)) is not None:
            return found, self.journal.value(value)
        tensors, result = compute()
        self.journal.keep_value(value, result)
        self.journal.keep_tensors(file, tensors)
        self._lap()
        kept = self.journal.tensors(file)
        assert kept is not None
        return kept, result

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep how far a long step has come, in place of what was kept under that name before."""
        self.journal.keep_tensors(self.steps / f"{name}.safetensors", tensors)
        self._lap()

    def saved(self, name: str) -> dict[str, Tensor] | None:
        """What `save` or `step` kept under a name, if it did."""
        return self.journal.tensors(self.steps / f"{name}.safetensors")

    def forget(self, name: str) -> None:
        """Remove what `save` kept under a name."""
        self.journal.forget(self.steps / f"{name}.safetensors")

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Like `step`, for tensors that are part of the finished artifact, as file ``name``."""
        return self._once(self.content / name, compute)

    def has(self, name: str) -> bool:
        """Whether the tensors ``name`` of the content are there already, as they were written."""
        return self.journal.has(self.content / name)

    def _once(self, path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = self.journal.tensors(path)
        if found is None:
            self.journal.keep_tensors(path, compute())
            self._lap()
            found = self.journal.tensors(path)
            assert found is not None
        return found

    def _lap(self) -> None:
        if self.time is not None:
            self.time.lap()

    def json(self, name: str, value: object) -> None:
        """Add a JSON file to the artifact."""
        write_json(self.content / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Add a copy of a file to the artifact."""
        copy_file(source, self.content / name)

    def finish(
        self,
        facts: Facts,
        measured: Measured | None = None,
        notes: Notes | None = None,
        reports: Mapping[str, Any] | None = None,
    ) -> _A:
        """Write the manifest and rename the folder into place.

        Args:
            facts: what the stage says of the content, typed by the kind of artifact.
            measured: what depends on this machine and run, typed by the kind; its ``seconds`` are those of the work
                where they are 0.
            notes: where things are.
            reports: what stages of a recipe reported, each under a name of its own.

        Raises:
            InvalidInputError: the facts or the measurements are not those of the kind.
        """
        with explained_os_errors(self.output):
            files = {
                path.relative_to(self.content).as_posix(): sha256_file(path)
                for path in sorted(self.content.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            }
            content: dict[str, Any] = {
                "kind": self.kind.KIND,
                "schema": SCHEMA,
                "version": __version__,
                "request": self.request,
                "files": files,
                "made_from": dict(self.made_from),
                "recipe": self.recipe,
                "seed": self.seed,
                "facts": facts.to_json(),
                "measured": {
                    **(reports or {}),
                    "seconds": round(self.seconds, 3),
                    **(measured.to_json() if measured else {}),
                },
                "notes": msgspec.to_builtins(notes or Notes()),
            }
            content["sha256"] = sha256_of({key: content[key] for key in IDENTITY})
            content["integrity"] = sha256_of(content)
            manifest = typed(json.loads(canonical(content)), Manifest, self.output)
            described(self.output, manifest)
            write_json(self.content / MANIFEST, content)
            sync_below(self.content)
            if self.overwrite and is_artifact(self.output):
                os.rename(self.output, self.work / "replaced")
            elif self.output.is_dir():
                self.output.rmdir()  # it is empty; renaming onto a folder is not possible everywhere
            os.rename(self.content, self.output)
            sync(self.output.parent)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        shutil.rmtree(self.work, ignore_errors=True)
        return self.kind(self.output, manifest)

    @property
    def seconds(self) -> float:
        """Seconds of work so far, over all processes that took part in it."""
        return time.perf_counter() - self.started if self.time is None else self.time.total
