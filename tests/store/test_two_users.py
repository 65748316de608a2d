"""Two users and one cache: each is refused what the other made."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qdeploy.store.paths import cache_entry, cache_folder
from qdeploy.system.errors import QDeployError, UsageError

NOBODY = 65534
pytestmark = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can act as another user"
)


def as_nobody(call: Callable[[], object]) -> str:
    """What a call ends with in a child process of another user: its sentence, or nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ended = "raised something else"
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            call()
            ended = ""
        except QDeployError as error:
            ended = str(error)
        finally:
            os.write(writing, ended.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for a cache in a folder that everyone may enter and write to, as ``/tmp`` is."""
    shared = Path(tempfile.mkdtemp())
    shared.chmod(0o777)
    monkeypatch.setenv("QDEPLOY_CACHE", str(shared / "cache"))
    yield shared / "cache"
    shutil.rmtree(shared)


def test_the_cache_of_another_user_is_not_read(cache: Path) -> None:
    with cache_entry("models", "one") as entry:
        entry.write_text("mine")
    assert "belongs to another user" in as_nobody(cache_folder)
    assert entry.read_text() == "mine"


def test_a_cache_that_another_user_has_planted_is_not_used(cache: Path) -> None:
    assert as_nobody(cache_folder) == ""
    with pytest.raises(UsageError, match="belongs to another user: set QDEPLOY_CACHE to a folder of yours"):
        cache_folder()
