"""The timestep of the running call, and lookups by its value.

What depends on the timestep in addition to the network itself (a scale per group of timesteps, a table of temporal
features) asks `CurrentTimestep`. Lookups go by the timestep's value, never by counting calls: any scheduler with any
number of steps finds the nearest entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.call import signature_of, time_parameter


def midpoints(values: Tensor) -> Tensor:
    """Edges [T - 1] between sorted timesteps [T]: `CurrentTimestep.index` then finds the nearest of them."""
    return (values[1:] + values[:-1]) / 2


class CurrentTimestep:
    """Knows the timestep of each row of the call that is running.

    Attributes:
        now: [B] float32, or None outside of any call.
        check: what to do with every timestep of a call before it runs; raises for those that are refused.
        single: whether all rows are known to have one timestep, as in an engine's graph: then only the
            first is looked at.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[float, ...], Tensor] = {}
        self.now = None
        self.check: Callable[[float], None] | None = None
        self.single = False

    @property
    def now(self) -> Tensor | None:
        """The timesteps of the running call."""
        return self._now

    @now.setter
    def now(self, timesteps: Tensor | None) -> None:
        self._now = timesteps
        self._found.clear()

    def __deepcopy__(self, memo: Any) -> CurrentTimestep:
        return self  # a copied quantizer still asks that of the network that it is in

    @contextmanager
    def at(self, timesteps: Tensor) -> Iterator[None]:
        """Within, rows have these timesteps; shape [B] or [1] for all rows alike."""
        before = self.now
        self.now = timesteps.float().flatten()
        try:
            yield
        finally:
            self.now = before

    def index(self, edges: Tensor, known: tuple[float, ...] | None = None) -> Tensor:
        """Which entry each row uses: the number of edges below its timestep.

        Args:
            edges: [K - 1], ascending.
            known: their values, if a tracer has no others to compare: whoever names the same ones in the same call
                gets the same tensor, so that a traced graph looks the timestep up once and not in every layer.

        Returns:
            [B] int64 in ``[0, K - 1]``; at an edge the lower entry.
        """
        if known is not None and known in self._found:
            return self._found[known]
        assert self.now is not None, "nothing is running: it is set by the network's own forward"
        now = self.now[:1] if self.single else self.now
        index = (now[:, None] > edges).sum(1)
        if known is not None:
            self._found[known] = index
        return index


def attach_current_timestep(denoiser: nn.Module) -> CurrentTimestep:
    """Give a network the timestep of its running call; the same object if it has one already."""
    found: CurrentTimestep | None = current_timestep_of(denoiser)
    if found is not None:
        return found
    current = CurrentTimestep()
    signature = signature_of(denoiser)
    time = time_parameter(signature.parameters) or "timestep"

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments.get(time)
        current.now = None if given is None else torch.as_tensor(given).float().flatten()
        if current.check is not None and current.now is not None and not torch.compiler.is_compiling():
            for timestep in current.now.unique().tolist():
                current.check(timestep)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        current.now = None

    denoiser.register_forward_pre_hook(before, with_kwargs=True)
    denoiser.register_forward_hook(after, always_call=True)
    denoiser.__dict__["_current_timestep"] = current
    return current


def current_timestep_of(denoiser: nn.Module) -> CurrentTimestep | None:
    """What `attach_current_timestep` gave the network, if it did."""
    found: CurrentTimestep | None = denoiser.__dict__.get("_current_timestep")
    return found
