"""A GPU's memory, streams and graphs, by torch: tensors are shared with the pipeline, never copied through
the machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qdeploy.system.errors import CapabilityError

if TYPE_CHECKING:
    from torch import Tensor


class TorchCuda:
    """The current GPU, with a stream of its own: on the default stream TensorRT adds synchronizations.

    Attributes:
        stream: the stream's handle.

    Raises:
        CapabilityError: this torch cannot use the GPU.
    """

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise CapabilityError(
                f"torch {torch.__version__} cannot use the GPU: install the build of torch for CUDA, by the "
                "command that pytorch.org gives"
            )
        self._torch: Any = torch
        self._stream: Any = torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream

    def empty(self, shape: tuple[int, ...], dtype: str, host: bool = False) -> Tensor:
        """A buffer whose memory belongs to our stream; the allocator aligns it to 512 bytes."""
        kind = getattr(self._torch, dtype)
        if host:
            pinned: Tensor = self._torch.empty(shape, dtype=kind, pin_memory=True)
            return pinned
        with self._torch.cuda.stream(self._stream):
            buffer: Tensor = self._torch.empty(shape, dtype=kind, device="cuda")
        return buffer

    def enter(self, tensors: Mapping[str, Tensor]) -> None:
        """Our stream waits for what the caller's does with the tensors, and keeps them until it is done."""
        self._stream.wait_stream(self._torch.cuda.current_stream())
        for tensor in tensors.values():
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def leave(self, tensors: Mapping[str, Tensor]) -> None:
        """The caller's stream waits for ours."""
        current = self._torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for tensor in tensors.values():
            if tensor.is_cuda:
                tensor.record_stream(current)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy on our stream."""
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def clone(self, source: Tensor) -> Tensor:
        """A copy on our stream, in memory of its own."""
        with self._torch.cuda.stream(self._stream):
            return source.clone()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` as a CUDA graph; what is returned replays it on our stream."""
        graph = self._torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        """Wait for our stream."""
        self._stream.synchronize()
