"""Temporal features, computed before and looked up by the timestep's value.

The features of a network that depend on the timestep alone are a finite set; a table of them replaces the
layers that compute them ("cache-based maintenance" of Temporal Feature Matters, arXiv 2407.19547).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdeploy.network.current_timestep import CurrentTimestep
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import Format, int8
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown

STORAGES = ("auto", "fp32", "fp16", "int8")
EXACT = 1e-3  # relative error of every row up to which ``auto`` takes fp16: 60 dB


class FeatureTable(nn.Module):
    """One feature for every timestep.

    Attributes:
        rows: [T, ...], float32, float16 or integer codes.
        edges: [T - 1] midpoints between the timesteps of the rows.
        scale: [T] steps, if the rows are codes; else None.
        zero_point: [T] codes of zero, if the rows are codes; else None.
    """

    rows: Tensor
    edges: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        rows: Tensor,
        edges: Tensor,
        current: CurrentTimestep | None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("edges", edges)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.current_timestep = current

    @classmethod
    def quantized(
        cls, features: Tensor, edges: Tensor, current: CurrentTimestep | None, number_format: Format = int8
    ) -> FeatureTable:
        """Features [T, ...] as codes, each row with a scale and a zero point of its own."""
        flat = features.flatten(1)
        scale, zero = to_scale(flat.amin(1), flat.amax(1), number_format)
        codes = (flat / scale[:, None]).round() + zero[:, None]
        stored = torch.int8 if number_format.symmetric else torch.uint8
        codes = codes.clamp(number_format.qmin, number_format.qmax).to(stored).view(features.shape)
        return cls(codes, edges, current, scale, zero.to(stored))

    @classmethod
    def stored(
        cls, features: Tensor, edges: Tensor, current: CurrentTimestep | None, storage: str
    ) -> FeatureTable:
        """Features [T, ...] in one of `STORAGES`; ``auto`` is fp16 where that is exact enough, or else fp32.

        Raises:
            UsageError: there is no such storage, or float16 cannot hold the features.
        """
        if storage == "int8":
            return cls.quantized(features, edges, current)
        if storage == "auto":
            storage = "fp16" if held_by_fp16(features) else "fp32"
        if storage == "fp16":
            half = features.half()
            if not half.isfinite().all():
                raise UsageError("the temporal features exceed what fp16 holds: store them as fp32 or int8")
            return cls(half, edges, current)
        if storage != "fp32":
            raise UsageError(unknown("storage of a time table", storage, STORAGES))
        return cls(features.float(), edges, current)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Features of some rows by their numbers, or of all; float32."""

        def choose(stored: Tensor) -> Tensor:
            stored = stored.view(-1, *[1] * (self.rows.ndim - 1)) if stored.ndim == 1 else stored
            return (stored if rows is None else stored.index_select(0, rows)).float()

        if self.scale is None or self.zero_point is None:
            return choose(self.rows)
        return (choose(self.rows) - choose(self.zero_point)) * choose(self.scale)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The features of the running call's timesteps; the layer's input is not looked at."""
        assert self.current_timestep is not None
        return self.values(self.current_timestep.index(self.edges))

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def held_by_fp16(features: Tensor) -> bool:
    """Whether float16 holds every row of features [T, ...] with a relative error of `EXACT` at most."""
    rows = features.float().flatten(1)
    error = (rows.half().float() - rows).norm(dim=1)
    return bool((error <= EXACT * rows.norm(dim=1)).all())  # no inequality holds for NaN or Inf
