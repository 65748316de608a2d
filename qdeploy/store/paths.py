"""Default places: the cache, and the outputs of verbs that are given none."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from qdeploy.system.errors import UsageError


def cache_folder() -> Path:
    """``QDEPLOY_CACHE``, else ``qdeploy`` in the user's cache folder; made for this user alone if it is not there.

    Its content is trusted: compiled models are run as they lie there. So it has to be this user's own.

    Raises:
        UsageError: it belongs to someone else, others may write to it, or it cannot be made.
    """
    try:
        named = os.environ.get("QDEPLOY_CACHE")
        base = os.environ.get("XDG_CACHE_HOME")
        folder = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "qdeploy"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"the cache cannot be used ({reason}): set QDEPLOY_CACHE to a folder of yours"
        ) from error
    if hasattr(os, "getuid"):
        theirs = state.st_uid != os.getuid()
        if theirs or stat.S_IMODE(state.st_mode) & 0o022:
            why = "belongs to another user" if theirs else "can be written to by others"
            raise UsageError(f"the cache {folder} {why}: set QDEPLOY_CACHE to a folder of yours, of mode 700")
    return folder


@contextmanager
def cache_entry(*parts: str) -> Iterator[Path]:
    """The place of an entry of the cache, for one process at a time: a second one waits until the first is done.

    Args:
        parts: names of folders below the cache, and of the entry.

    Raises:
        UsageError: see `cache_folder`.
    """
    place = cache_folder().joinpath(*parts)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        yield place


def default_output(source: Path, suffix: str) -> Path:
    """``NAME-SUFFIX`` in the working directory, where NAME is the source's."""
    return Path(f"{source.resolve().name}-{suffix}")
