"""The calibration rows that harm is measured on, and relative noise at each of their timesteps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.calibrate.session import Session

TIMESTEPS = 8


@dataclass(frozen=True)
class TimestepRows:
    """Rows at several timesteps, equally many at each where the set has them.

    Attributes:
        numbers: of the rows in the calibration set.
        timesteps: [T] distinct timesteps, ascending.
        place: [rows] which of them each row has.
    """

    numbers: list[int]
    timesteps: Tensor
    place: Tensor

    def by_timestep(self, values: Tensor) -> Tensor:
        """[T] sums of values [rows] over the rows of each timestep."""
        return torch.zeros(len(self.timesteps), dtype=torch.float64).index_add(0, self.place, values.double())


def choose_rows(session: Session, count: int) -> TimestepRows:
    """So many rows, spread over up to `TIMESTEPS` timesteps from the smallest to the largest."""
    timesteps = session.data.timesteps.flatten().double()
    distinct = timesteps.unique()
    wanted = min(TIMESTEPS, count, len(distinct))
    chosen = distinct[torch.linspace(0, len(distinct) - 1, wanted).round().long()]
    order = torch.randperm(len(timesteps), generator=session.generator("sensitivity rows"))
    each = max(1, count // wanted)
    numbers: list[int] = []
    for timestep in chosen:
        numbers += order[timesteps[order] == timestep][:each].tolist()
    numbers.sort()
    return TimestepRows(numbers, chosen, torch.searchsorted(chosen, timesteps[numbers].contiguous()))


def row_powers(values: Tensor) -> Tensor:
    """[rows] sum of squares of each row, in double precision."""
    return values.double().square().flatten(1).sum(1).cpu()
