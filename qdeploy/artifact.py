"""Artifacts: one folder per stage, described, hashed and written whole or not at all.

A folder holds its files and a manifest, ``qdeploy.json``:

    kind, schema, version   what it is, and which qdeploy wrote it
    files                   SHA-256 of every file
    made_from               SHA-256 of every artifact or model it was made from
    recipe, seed, facts     everything else that determines the content
    sha256                  the identity: a hash of all of the above
    measured, notes         what depends on the machine (times, paths); not part of the identity
    integrity               a hash of the whole manifest, so that damage anywhere is found

While it is being made, an artifact lives in a hidden sibling, ``.NAME.work``. Finished steps stay
there after an interruption and are found again by the next run of the same request. One rename makes
the artifact appear, so a folder that exists is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qdeploy.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
MANIFEST = "qdeploy.json"
KINDS = {
    "calibration-set": "denoiser inputs recorded along the sampling trajectory",
    "checkpoint": "integer weights and activation scales",
    "onnx": "an ONNX graph, with Q/DQ where it is quantized",
    "engine": "a graph that one backend runs",
    "samples": "images, with their seeds",
}
_IDENTITY = ("kind", "schema", "files", "made_from", "recipe", "seed", "facts")


def canonical(value: object) -> bytes:
    """JSON bytes that depend on nothing but the value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(value: object) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_files(paths: Mapping[str, Path]) -> str:
    """One SHA-256 over named files."""
    return sha256_of({name: sha256_file(path) for name, path in paths.items()})


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


@dataclass(frozen=True)
class Artifact:
    """A complete, verified artifact folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.manifest["kind"])

    @property
    def sha256(self) -> str:
        """The identity: equal content made in the same way has an equal hash."""
        return str(self.manifest["sha256"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage says of its content; part of the identity."""
        return dict(self.manifest["facts"])

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe, where one was involved."""
        recipe: dict[str, Any] | None = self.manifest["recipe"]
        return recipe

    def file(self, name: str) -> Path:
        """Path of one of the artifact's files."""
        return self.path / name

    def summary(self, seconds: float) -> dict[str, Any]:
        """The JSON object that every verb prints for what it wrote."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "seconds": round(seconds, 3),
        }


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a folder that claims to be an artifact."""
    return (path / MANIFEST).is_file()


def open_artifact(path: str | Path, *kinds: str) -> Artifact:
    """Read and verify an artifact.

    Args:
        path: the folder.
        kinds: the kinds that are welcome; any, if none is named.

    Raises:
        InvalidInputError: it is no artifact, damaged, of a newer schema or of another kind.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if kinds and manifest["kind"] not in kinds:
        wanted = " or ".join(kinds)
        raise InvalidInputError(f"{path} is of kind {manifest['kind']!r}, but {wanted!r} is needed here")
    for problem in damage(path, manifest):
        raise InvalidInputError(f"{path} is damaged: {problem}; make it again or restore it from a copy")
    return Artifact(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, its schema and integrity checked, the files not.

    Raises:
        InvalidInputError: there is none that this version can read.
    """
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist")
    if not is_artifact(path):
        raise InvalidInputError(f"{path} is not a qdeploy artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        schema, kind = int(manifest["schema"]), str(manifest["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is damaged: its {MANIFEST} cannot be read ({error})") from error
    if schema > SCHEMA:
        raise InvalidInputError(
            f"{path} was written by a newer qdeploy (schema {schema}, this one reads up to {SCHEMA}): "
            "upgrade qdeploy"
        )
    recorded = manifest.get("integrity")
    content = {key: value for key, value in manifest.items() if key != "integrity"}
    if recorded != sha256_of(content):
        raise InvalidInputError(f"{path} is damaged: its {MANIFEST} was changed after it was written")
    if kind not in KINDS:
        raise InvalidInputError(f"{path} is of the unknown kind {kind!r}")
    return dict(manifest)


def damage(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an artifact's files, a sentence each."""
    for name, recorded in manifest["files"].items():
        file = path / name
        if not file.is_file():
            yield f"the file {name} is missing"
        elif sha256_file(file) != recorded:
            yield f"the file {name} does not match its recorded hash"


@dataclass
class Draft:
    """An artifact in the making. Use as a context manager; `finish` makes it appear.

    Args:
        output: where the artifact will stand.
        kind: one of `KINDS`.
        made_from: hashes of the inputs, by name.
        recipe: the resolved recipe, if any.
        seed: the seed that all randomness of the stage derives from.
        options: what else determines the result; together with the above it names the request, and
            only the same request takes up unfinished work or accepts a finished artifact.
        overwrite: replace an artifact that another request left at ``output``.

    Raises:
        UsageError: ``output`` exists and was not made by this request, or cannot be written.
    """

    output: Path
    kind: str
    made_from: Mapping[str, str]
    recipe: Mapping[str, Any] | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self.work = self.output.parent / f".{self.output.name}.work"
        self.content = self.work / "content"
        self.steps = self.work / "steps"
        self.started = time.perf_counter()
        self.request = sha256_of(
            {
                "kind": self.kind,
                "version": __version__,
                "made_from": dict(self.made_from),
                "recipe": self.recipe,
                "seed": self.seed,
                "options": dict(self.options),
            }
        )
        self._lock: int | None = None

    def finished(self) -> Artifact | None:
        """The artifact, if this very request has already been carried out.

        Raises:
            UsageError: something else stands at ``output``.
        """
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        if is_artifact(self.output) and read_manifest(self.output).get("request") == self.request:
            shutil.rmtree(self.work, ignore_errors=True)
            return open_artifact(self.output, self.kind)
        if self.overwrite and is_artifact(self.output):
            return None
        what = "holds another artifact" if is_artifact(self.output) else "already exists"
        raise UsageError(
            f"{self.output} {what}: choose another output"
            + (", or pass --overwrite to replace it" if is_artifact(self.output) else "")
        )

    def __enter__(self) -> Draft:
        with explained_os_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(exist_ok=True)
            self._take_lock()
            request = self.work / "request"
            if not request.exists() or request.read_text() != self.request:
                for stale in (self.content, self.steps):
                    shutil.rmtree(stale, ignore_errors=True)
                write_atomically(request, lambda path: _write_text(path, self.request))
            self.content.mkdir(exist_ok=True)
            self.steps.mkdir(exist_ok=True)
            for folder in (self.content, self.steps):
                for partial in folder.rglob(".*"):  # half-written by a process that was killed
                    partial.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if isinstance(error, OSError):
            with explained_os_errors(self.output):
                raise error
        empty = not any(self.steps.glob("*")) and not any(self.content.rglob("*.safetensors"))
        if kind is not None and self.work.exists() and empty:
            shutil.rmtree(self.work, ignore_errors=True)

    def _take_lock(self) -> None:
        self._lock = os.open(self.work / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise UsageError(
                f"another process is writing {self.output}: wait for it or choose another output"
            ) from None

    def step(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a named step of the work: computed once, then found again after a stop."""
        return self._once(self.steps / f"{name}.safetensors", compute)

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Like `step`, for tensors that are part of the finished artifact, as file ``name``."""
        return self._once(self.content / name, compute)

    def has(self, name: str) -> bool:
        """Whether the content file ``name`` is there already."""
        return (self.content / name).exists()

    def _once(self, path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if not path.exists():
            tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
            write_atomically(path, lambda partial: _save_tensors(tensors, partial))
        return load_file(path)

    def json(self, name: str, value: object) -> None:
        """Add a JSON file to the artifact."""
        write_json(self.content / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Add a copy of a file to the artifact."""
        write_atomically(self.content / name, lambda partial: _copy(source, partial))

    def finish(
        self,
        facts: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Write the manifest and rename the folder into place."""
        with explained_os_errors(self.output):
            files = {
                path.relative_to(self.content).as_posix(): sha256_file(path)
                for path in sorted(self.content.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            }
            manifest: dict[str, Any] = {
                "kind": self.kind,
                "schema": SCHEMA,
                "version": __version__,
                "request": self.request,
                "files": files,
                "made_from": dict(self.made_from),
                "recipe": self.recipe,
                "seed": self.seed,
                "facts": dict(facts or {}),
                "measured": {"seconds": round(time.perf_counter() - self.started, 3), **(measured or {})},
                "notes": dict(notes or {}),
            }
            manifest["sha256"] = sha256_of({key: manifest[key] for key in _IDENTITY})
            manifest["integrity"] = sha256_of(manifest)
            write_json(self.content / MANIFEST, manifest)
            if self.overwrite and is_artifact(self.output):
                shutil.rmtree(self.output)
            os.rename(self.content, self.output)
            shutil.rmtree(self.work, ignore_errors=True)
        return Artifact(self.output, json.loads(canonical(manifest)))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library reports the system's refusals as text; they are ours to explain.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


@contextmanager
def explained_os_errors(output: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into a sentence about ``output``."""
    import errno

    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapabilityError(
                f"no space left for {output}: free some and run the same command again, finished steps are kept"
            ) from error
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error
