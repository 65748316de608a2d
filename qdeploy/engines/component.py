"""The other engines of a pipeline: text encoders and halves of autoencoders, each one graph on a runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.engines.base import Port
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


class EngineComponent(ABC):
    """A graph other than the denoiser that a runtime executes. Any number of threads may call it.

    Args:
        folder: holds the runtime's files.

    Attributes:
        folder: the same.
        ports: inputs by name.
        outputs: names of the outputs, in the graph's order.
    """

    ports: dict[str, Port]
    outputs: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, float32, where the inputs lie.

        Raises:
            InvalidInputError: an input is missing, unknown, or of a shape that the graph cannot take.
        """
        import torch

        if inputs.keys() != self.ports.keys():
            raise InvalidInputError(
                f"{self.folder} takes {', '.join(self.ports)}, and was given {', '.join(inputs)}"
            )
        ready: dict[str, Tensor] = {}
        for name, port in self.ports.items():
            x = inputs[name].detach().to("cpu", getattr(torch, port.dtype)).contiguous()
            if not port.takes(x.shape):
                wanted = ", ".join("any" if size is None else str(size) for size in port.shape)
                raise InvalidInputError(
                    f"the graph of {self.folder} takes {name!r} of shape [{wanted}], not {list(x.shape)}"
                )
            ready[name] = x
        home = next(iter(inputs.values())).device
        results = self._run(ready)
        return {name: result.to(home) for name, result in zip(self.outputs, results, strict=True)}

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """One call of the runtime: contiguous tensors of the graph's dtypes, on the CPU."""
