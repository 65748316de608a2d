"""What range the input of every layer has at each timestep, observed while a network samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from qdeploy.network.observe import ModuleCall, observing
from qdeploy.network.tracer import WEIGHTED
from qdeploy.quant.activation_statistics import RowExtremes
from qdeploy.quant.time_ranges import ranges_by_timestep


class LayerRanges:
    """Keeps the smallest and largest input of every weighted layer; a context manager around the calls.

    Two numbers are kept for each layer and call, on the device until they are asked for.

    Args:
        denoiser: the network.
        timestep: that of the running call, or None if the call is not to be observed.
    """

    def __init__(self, denoiser: nn.Module, timestep: Callable[[], float | None]) -> None:
        self._denoiser, self._timestep = denoiser, timestep
        self._seen: dict[str, list[tuple[float, Tensor]]] = {}
        self._observers = ExitStack()

    def __enter__(self) -> LayerRanges:
        modules = self._denoiser.named_modules()
        layers = {path: module for path, module in modules if isinstance(module, WEIGHTED)}
        self._observers.enter_context(observing(layers, self._before))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observers.close()

    def _before(self, call: ModuleCall) -> None:
        timestep = self._timestep()
        if timestep is not None and call.args and call.input.numel():
            extremes = torch.stack(call.input.aminmax())
            self._seen.setdefault(call.name, []).append((timestep, extremes))

    def tensors(self) -> dict[str, Tensor]:
        """The ranges by path (see `ranges_by_timestep`); layers in the order of execution."""
        seen_by_layer = {}
        for path, seen in self._seen.items():
            lows, highs = torch.stack([extremes for _, extremes in seen]).float().cpu().unbind(1)
            timesteps = torch.tensor([timestep for timestep, _ in seen])
            seen_by_layer[path] = RowExtremes([lows], [highs], [timesteps])
        return ranges_by_timestep(seen_by_layer)
