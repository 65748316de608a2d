"""What range the input of every layer has at each timestep, watched while a network samples."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.network.roles import WEIGHTED
from qdeploy.quant.ranges import Summary
from qdeploy.quant.time_ranges import ranges_by_timestep


class LayerRanges:
    """Keeps the smallest and largest input of every weighted layer; a context manager around the calls.

    Two numbers are kept for each layer and call, on the device until they are asked for.

    Args:
        denoiser: the network.
        timestep: that of the running call, or None if the call is not to be watched.
    """

    def __init__(self, denoiser: nn.Module, timestep: Callable[[], float | None]) -> None:
        self._denoiser, self._timestep = denoiser, timestep
        self._seen: dict[str, list[tuple[float, Tensor]]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerRanges:
        for path, module in self._denoiser.named_modules():
            if isinstance(module, WEIGHTED):
                self._hooks.append(module.register_forward_pre_hook(self._watch(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            timestep = self._timestep()
            if timestep is not None and args and args[0].numel():
                extremes = torch.stack(args[0].detach().aminmax())
                self._seen.setdefault(path, []).append((timestep, extremes))

        return before

    def tensors(self) -> dict[str, Tensor]:
        """The ranges by path, as of `ranges_by_timestep`; layers in the order of execution."""
        summaries = {}
        for path, seen in self._seen.items():
            lows, highs = torch.stack([extremes for _, extremes in seen]).float().cpu().unbind(1)
            timesteps = torch.tensor([timestep for timestep, _ in seen])
            summaries[path] = Summary(lows=[lows], highs=[highs], timesteps=[timesteps])
        return ranges_by_timestep(summaries)
