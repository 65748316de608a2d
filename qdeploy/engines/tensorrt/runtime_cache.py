"""Kernels that TensorRT for RTX compiles on the GPU when an engine is first used, kept from one run to the next.

A plan of this library has no kernels, only what they are to compute: its just-in-time compiler makes them for the GPU
at hand. The library takes the ones that it made before from a runtime cache, which it writes as bytes; they belong to
the plan, the GPU and the driver, so that they lie in the cache folder, not in the artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdeploy.store.files import write_atomically
from qdeploy.system.progress import say


class RuntimeCache:
    """The settings with which contexts of a plan are made: kept kernels, and the library's own CUDA graphs.

    Args:
        trt: the module.
        engine: the plan's engine.
        file: where the kernels are kept.
        graphs: let the library record each set of shapes and addresses as a CUDA graph, and replay it.
    """

    def __init__(self, trt: Any, engine: Any, file: Path, graphs: bool) -> None:
        self._file = file
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        self._kept = file.read_bytes() if file.is_file() else b""
        if self._kept and not cache.deserialize(self._kept):
            say(
                f"warning: {file} was made with another driver or GPU, or is damaged: kernels are compiled again"
            )
            self._kept = b""
        config.set_runtime_cache(cache)
        config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else trt.CudaGraphStrategy.DISABLED
        )
        # Both have to outlive the contexts that are made with them.
        self.config, self._cache = config, cache

    def save(self) -> None:
        """Keep the kernels that were compiled since the engine was opened; nothing where there are no new ones."""
        cache = self._cache
        memory = cache.serialize()
        content = b"" if memory is None else bytes(memoryview(memory))
        if not content or content == self._kept:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, lambda partial: _write(partial, content))
        self._kept = content


def _write(partial: Path, content: bytes) -> None:
    partial.write_bytes(content)
