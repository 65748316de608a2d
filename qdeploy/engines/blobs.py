"""A cache of compiled models: one file per graph, shapes, options, runtime and processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdeploy.store.files import write_atomically
from qdeploy.store.paths import cache_folder
from qdeploy.system.machine import cpu_identity, cpu_model
from qdeploy.system.progress import say

# All blobs together; the least recently used ones are deleted first.
MOST_BYTES = 4 * 2**30
# A blob is in memory twice while it is written: larger ones are compiled each time.
LARGEST_BYTES = 2**30


class Blobs:
    """The compiled models (blobs) of one graph.

    A blob is code for the processor that it was compiled on; on another it may fail or compute wrong results. Its
    name and its header therefore hold what it was compiled from and for, and its header the hash of the rest.
    A blob that does not match is compiled again. Files are renamed into place when complete, so that processes
    that compile the same model at the same time only do the work twice.

    Args:
        model: what identifies the graph: hashes of its files.
        runtime: name and version of what compiles it.
        folder: where blobs are; in the user's cache by default.
    """

    def __init__(self, model: Mapping[str, str], runtime: str, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "blobs" if folder is None else folder
        self._model = {"files": dict(model), "runtime": runtime}

    def read(self, request: Mapping[str, Any]) -> bytes | None:
        """The blob of a request (shapes and options), if there is one for this processor and it is whole."""
        graph, processor = self._names(request)
        path = self.folder / f"{graph}-{processor}.blob"
        try:
            data = path.read_bytes()
        except OSError:
            self._tell_of_others(graph)
            return None
        head, _, blob = data.partition(b"\n")
        if head != self._head(request, blob):
            say(f"the compiled model {path.name} is damaged: compiling it again")
            self.drop(request)
            return None
        path.touch()
        return blob

    def write(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Store a blob; a cache that cannot be written to is reported and otherwise ignored."""
        if len(blob) > LARGEST_BYTES:
            return
        data = self._head(request, blob) + b"\n" + blob

        def write(partial: Path) -> None:
            partial.write_bytes(data)

        try:
            write_atomically(self._path(request), write)
            self._make_room()
        except OSError as error:
            say(f"{self.folder} cannot keep compiled models: {error.strerror or error}")

    def drop(self, request: Mapping[str, Any]) -> None:
        """Delete a blob that cannot be used."""
        self._path(request).unlink(missing_ok=True)

    def _path(self, request: Mapping[str, Any]) -> Path:
        return self.folder / f"{'-'.join(self._names(request))}.blob"

    def _names(self, request: Mapping[str, Any]) -> tuple[str, str]:
        """Hashes of what a blob is compiled from, and of the processor."""
        return _digest(self._model | {"request": dict(request)}), _digest(cpu_identity())

    def _head(self, request: Mapping[str, Any], blob: bytes) -> bytes:
        """The line of JSON that a valid blob begins with."""
        header = {
            **self._model,
            "request": dict(request),
            "processor": cpu_identity(),
            "sha256": sha256(blob).hexdigest(),
        }
        return json.dumps(header, sort_keys=True).encode()

    def _tell_of_others(self, graph: str) -> None:
        for path in self.folder.glob(f"{graph}-*.blob"):
            try:
                with path.open("rb") as stream:
                    other = json.loads(stream.readline())["processor"]["cpu"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            say(
                f"this engine was compiled for another processor ({other}): compiling it again for {cpu_model()}"
            )
            return

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("*.blob"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process has made room
                continue
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
