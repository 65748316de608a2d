"""The timing cache: kernel timings of a build, kept for the next one.

Its content holds for one GPU model and one version of TensorRT, so both are part of the file's name. Several
builds may share it: it is locked, and what others added meanwhile is merged, not overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from qdeploy.store.files import write_atomically
from qdeploy.system.errors import UsageError
from qdeploy.system.gpu import Gpu
from qdeploy.system.progress import say


def cache_file(place: Path, version: str, gpu: Gpu) -> Path:
    """The file for this GPU and version: ``place`` itself, or in it where it is a folder."""
    key = f"trt{version}-sm{gpu.sm}-{'-'.join(gpu.name.split())}.timing"
    return place / key if place.is_dir() or not place.suffix else place.with_name(f"{place.stem}-{key}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one that reads or writes the cache; waits for others."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise UsageError(f"--timing-cache cannot be written at {path}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def load_cache(config: Any, path: Path) -> None:
    """Give a build what earlier ones measured.

    TensorRT refuses what comes from another machine; the build then starts with nothing.
    """
    with locked(path):
        known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        say(f"warning: TensorRT does not take the timing cache {path}, starting with an empty one")
        if not config.set_timing_cache(config.create_timing_cache(b""), False):
            say("warning: TensorRT takes no timing cache at all, every kernel is timed anew")


def save_cache(config: Any, path: Path) -> None:
    """Keep what a build measured, together with what others added since."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with locked(path):
        if path.is_file() and (known := path.read_bytes()):
            others = config.create_timing_cache(known)
            if others is None or not cache.combine(others, False):
                say(f"warning: the timing cache {path} did not fit and is replaced", level=2)
        content = cache.serialize()
        if content is not None:
            write_atomically(path, lambda partial: _write(partial, content))


def _write(path: Path, content: Any) -> None:
    path.write_bytes(memoryview(content))
