"""Ranges of activations for each of their channels (QuEST, arXiv 2402.03666, for 4-bit activations).

Scales along the features stand inside of a layer's sum, where no static integer kernel can take them out:
what has them is a simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qdeploy.quant.ranges import WEIGHT_FINDERS, Summary
from qdeploy.recipe.formats import Format


@dataclass
class ChannelSummary(Summary):
    """A `Summary` that keeps the same of every channel.

    Attributes:
        axis: the tensor's axis that holds its channels: 1, or -1.
        channel_lows: [rows, C] smallest value of each row and channel.
        channel_highs: [rows, C] largest value.
        channel_kept: [rows, C, n] sampled values; which, depends on the size alone.
    """

    axis: int = 1
    channel_lows: list[Tensor] = field(default_factory=list)
    channel_highs: list[Tensor] = field(default_factory=list)
    channel_kept: list[Tensor] = field(default_factory=list)

    def observe(self, x: Tensor, timesteps: Tensor | None = None) -> None:
        super().observe(x, timesteps)
        rows = x.detach().movedim(self.axis, 1)
        rows = rows.reshape(*rows.shape[:2], -1).float()
        self.channel_lows.append(rows.amin(2).cpu())
        self.channel_highs.append(rows.amax(2).cpu())
        channels, size = rows.shape[1:]
        wanted = max(4, self.per_row // channels)
        if size > wanted:
            positions = torch.randint(0, size, (wanted,), generator=torch.Generator().manual_seed(size))
            rows = rows[:, :, positions.to(rows.device)]
        self.channel_kept.append(rows.cpu())

    def _select(self, rows: Tensor) -> ChannelSummary:
        whole = super()._select(rows)
        lows, highs, kept = (
            [torch.cat(parts)[rows]] for parts in (self.channel_lows, self.channel_highs, self.channel_kept)
        )
        return ChannelSummary(
            self.per_row,
            whole.low,
            whole.high,
            whole.lows,
            whole.highs,
            [],
            whole.kept,
            self.axis,
            lows,
            highs,
            kept,
        )

    def channel_values(self) -> Tensor:
        """[C, values] the sample of each channel, with the extremes of every row."""
        kept = torch.cat([part.movedim(1, 0).flatten(1) for part in self.channel_kept], 1)
        return torch.cat([kept, *(part.T for part in (*self.channel_lows, *self.channel_highs))], 1)

    def find(self, finder: str, number_format: Format) -> tuple[Tensor, Tensor]:
        """Scale [C] and zero point [C], each channel's by itself; ``finder`` is one of `WEIGHT_FINDERS`."""
        return WEIGHT_FINDERS[finder](self.channel_values(), number_format)
