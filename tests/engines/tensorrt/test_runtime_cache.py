"""Kept kernels: what is read, written and said; names and arguments are checked in test_conformance.py.

Without a driver the library opens no plan, so that the engine is a substitute; the enumerations are the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdeploy.engines.tensorrt.runtime_cache import RuntimeCache

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs the package tensorrt-rtx, which the extra dev installs"
)


class Cache:
    """As the library's: takes bytes of its own making alone, and gains a kernel with every context."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        fits = blob.startswith(b"kernels")
        self.content = blob if fits else self.content
        return fits

    def serialize(self) -> bytes | None:
        return self.content or None


class Config:
    def __init__(self) -> None:
        self.cache: Any = None
        self.cuda_graph_strategy: Any = None

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Engine:
    def create_runtime_config(self) -> Config:
        return Config()


def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "plan-sm89.kernels"
    first = RuntimeCache(trt, Engine(), file, graphs=True)
    assert first.config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    first.save()
    assert not file.exists()  # nothing was compiled yet
    first.config.cache.content = b"kernels 1"
    first.save()
    second = RuntimeCache(trt, Engine(), file, graphs=False)
    assert second.config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
    assert second.config.cache.content == b"kernels 1"
    written = file.stat().st_mtime_ns
    second.save()
    assert file.stat().st_mtime_ns == written  # nothing is new


def test_what_does_not_fit_is_named_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan-sm89.kernels"
    file.write_bytes(b"of another driver")
    cache = RuntimeCache(trt, Engine(), file, graphs=True)
    assert capsys.readouterr().err.startswith("warning: ")
    assert cache.config.cache.content == b""
    cache.config.cache.content = b"kernels 2"
    cache.save()
    assert file.read_bytes() == b"kernels 2"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
