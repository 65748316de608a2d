"""What is kept of an activation over all calibration rows: extremes of rows, and a histogram of every value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from qdeploy.quant.histogram import Histogram

CHANNEL_BITS = 3  # of a channel's histogram: coarser than a tensor's, since there are many of them


@dataclass
class RowExtremes:
    """The smallest and the largest value of each row.

    Attributes:
        lows: parts of a [rows] tensor.
        highs: parts of a [rows] tensor.
        timesteps: parts of a [rows] tensor, where timesteps are known.
    """

    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor]:
        """[rows] smallest and [rows] largest values, on the CPU."""
        return torch.cat(self.lows).cpu(), torch.cat(self.highs).cpu()


@dataclass
class ActivationStatistics(RowExtremes):
    """The extremes of rows, and histograms of all values.

    Attributes:
        by_timestep: whether every timestep has a histogram of its own, for groups of timesteps.
        axis: the tensor's axis that holds its channels, if each has a histogram of its own: 1, or -1.
        histograms: by timestep, or a single one.
    """

    by_timestep: bool = False
    axis: int | None = None
    histograms: dict[float | None, Histogram] = field(default_factory=dict)

    def observe(self, x: Tensor, timesteps: Tensor | None = None) -> None:
        """Take in values [rows, ...].

        Args:
            x: the values. Rows may be folded: several, in order, for each of the timesteps.
            timesteps: [T] of the rows; one, or as many as rows, or a divisor of these.
        """
        x = x.detach()
        rows = x.reshape(len(x), -1)
        self.lows.append(rows.amin(1).float())
        self.highs.append(rows.amax(1).float())
        if timesteps is not None:
            timesteps = timesteps.cpu().repeat_interleave(len(rows) // len(timesteps))
            self.timesteps.append(timesteps)
        if not self.by_timestep or timesteps is None:
            self._count(None, x)
            return
        for timestep in timesteps.unique().tolist():
            self._count(timestep, x[(timesteps == timestep).to(x.device)])

    def _count(self, timestep: float | None, x: Tensor) -> None:
        if self.axis is None:
            histogram = self.histograms.setdefault(timestep, Histogram())
            histogram.add(x)
        else:
            channels = x.movedim(self.axis, 0).flatten(1)
            histogram = self.histograms.setdefault(timestep, Histogram(len(channels), CHANNEL_BITS))
            histogram.add(channels)

    @property
    def histogram(self) -> Histogram:
        """Of all values, whatever their timestep."""
        return reduce(Histogram.merged, self.histograms.values())

    @property
    def low(self) -> float:
        """The smallest value, or 0."""
        return min(0.0, float(self.joined()[0].min()))

    @property
    def high(self) -> float:
        """The largest value, or 0."""
        return max(0.0, float(self.joined()[1].max()))

    def groups(self, edges: Tensor) -> list[ActivationStatistics]:
        """The statistics of each group of timesteps; ``edges`` [K - 1] (see `CurrentTimestep.index`).

        Args:
            edges: ascending; there may be some only if timesteps have histograms of their own.
        """
        if not len(edges):
            return [self]
        place = torch.bucketize(torch.cat(self.timesteps), edges)
        lows, highs = self.joined()
        groups = []
        for number in range(len(edges) + 1):
            chosen = place == number
            own = {
                timestep: histogram
                for timestep, histogram in self.histograms.items()
                if int(torch.bucketize(torch.tensor(float(timestep or 0)), edges)) == number
            }
            groups.append(
                ActivationStatistics([lows[chosen]], [highs[chosen]], [], True, self.axis, histograms=own)
            )
        return groups
