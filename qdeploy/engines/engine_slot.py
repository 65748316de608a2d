"""Engines that are loaded when their turn comes, one at a time: to compare what does not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qdeploy.engines.base import Engine, Kernel
from qdeploy.store.artifact import Artifact

if TYPE_CHECKING:
    from torch import Tensor


class Seat:
    """Room for one loaded engine; whoever takes it makes the last one go.

    Args:
        load: opens an engine.
    """

    def __init__(self, load: Callable[[Artifact], Engine]) -> None:
        self._load = load
        self._taken: tuple[str, Engine] | None = None

    def take(self, artifact: Artifact) -> Engine:
        """The engine, loaded; it may be used until another one takes the seat."""
        if self._taken is None or self._taken[0] != artifact.sha256:
            self.leave()
            self._taken = (artifact.sha256, self._load(artifact))
        return self._taken[1]

    def leave(self) -> None:
        """Free what the last one holds."""
        if self._taken is not None:
            self._taken[1].close()
            self._taken = None


class EngineInTurn(Engine):
    """An engine that is loaded by its first call, and again by the first one after another engine's.

    Args:
        artifact: the engine's folder.
        seat: shared with those that it takes turns with.
    """

    def __init__(self, artifact: Artifact, seat: Seat) -> None:
        super().__init__(artifact)
        self._artifact, self._seat = artifact, seat

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """As of `Engine`."""
        return self._seat.take(self._artifact)(inputs)

    def timed(self, inputs: Mapping[str, Tensor]) -> float:
        """As of `Engine`; loading counts, so that a call should come before."""
        return self._seat.take(self._artifact).timed(inputs)

    def kernels(self, inputs: Mapping[str, Tensor], *, calls: int = 0) -> list[Kernel]:
        """As of `Engine`."""
        return self._seat.take(self._artifact).kernels(inputs, calls=calls)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._seat.take(self._artifact)._run(inputs)

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        return self._seat.take(self._artifact)._kernels(inputs, calls)

    def close(self) -> None:
        """Free the seat, whoever has it: the turns are over."""
        self._seat.leave()
