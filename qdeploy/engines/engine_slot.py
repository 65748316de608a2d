"""Engines of which one at a time is loaded, to compare engines that do not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qdeploy.engines.base import Engine, Kernel
from qdeploy.engines.spec import EngineSpec
from qdeploy.store.artifact import EngineFolder

if TYPE_CHECKING:
    from torch import Tensor


class EngineSlot:
    """Keeps at most one engine loaded; opening another closes the previous one.

    Args:
        load: opens an engine.
    """

    def __init__(self, load: Callable[[EngineFolder], Engine]) -> None:
        self._load = load
        self._taken: tuple[str, Engine] | None = None

    def take(self, artifact: EngineFolder) -> Engine:
        """The engine, loaded; it may be used until another one is opened."""
        if self._taken is None or self._taken[0] != artifact.sha256:
            self.leave()
            self._taken = (artifact.sha256, self._load(artifact))
        return self._taken[1]

    def leave(self) -> None:
        """Close the engine that is loaded."""
        if self._taken is not None:
            self._taken[1].close()
            self._taken = None


class EngineInTurn(Engine):
    """An engine that is loaded at its first call, and again at the first call after another engine was loaded.

    Args:
        artifact: the engine's folder.
        slot: shared with the engines that it alternates with.
    """

    def __init__(self, artifact: EngineFolder, slot: EngineSlot) -> None:
        super().__init__(EngineSpec.of(artifact))
        self._artifact, self._slot = artifact, slot

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`."""
        return self._slot.take(self._artifact)(inputs)

    def timed(self, inputs: Mapping[str, Tensor]) -> float:
        """See `Engine`; the time includes loading, so call the engine once before."""
        return self._slot.take(self._artifact).timed(inputs)

    def kernels(self, inputs: Mapping[str, Tensor], *, calls: int = 0) -> list[Kernel]:
        """See `Engine`."""
        return self._slot.take(self._artifact).kernels(inputs, calls=calls)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._slot.take(self._artifact)._run(inputs)

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        return self._slot.take(self._artifact)._kernels(inputs, calls)

    def close(self) -> None:
        """Close whichever engine is loaded."""
        self._slot.leave()
