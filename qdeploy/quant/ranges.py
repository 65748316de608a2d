"""Range finders: from values to a scale and a zero point.

A finder for activations sees a `Summary` of all values that passed; one for weights sees the weight. No
result depends on the order of the calibration rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qdeploy.quant.operators import to_grid
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import UsageError

SHRINKS = tuple(1 - 0.01 * i for i in range(80))
_SMALLEST = torch.finfo(torch.float32).tiny * 2**10


def to_scale(low: Tensor, high: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]``; zero is always a code of its own.

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        number_format: the grid.

    Returns:
        Scale (float32, positive) and zero point (int32), both shaped like ``low``. A range that holds
        only zero gets scale 1.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if number_format.symmetric:
        span, steps = torch.maximum(-low, high), number_format.qmax
    else:
        span, steps = high - low, number_format.qmax - number_format.qmin
    scale = torch.where(span > 0, (span / steps).clamp(min=_SMALLEST), torch.ones_like(span))
    if number_format.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (number_format.qmin - low / scale).round().clamp(number_format.qmin, number_format.qmax)
    return scale, zero_point.to(torch.int32)


# -- weights -----------------------------------------------------------------------------------------------


def minmax_weights(weight: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover every weight: [C] per output channel, or [C, blocks]."""
    rows = _sharing(weight, number_format)
    return to_scale(rows.amin(-1), rows.amax(-1), number_format)


def lp_weights(weight: Tensor, number_format: Format, p: float = 2.4) -> tuple[Tensor, Tensor]:
    """Range per output channel or block, shrunk to minimise the mean of ``|w - w_hat|**p``.

    The range is shrunk jointly by 1.00, 0.99, ..., 0.21 (Q-Diffusion's released code, its ``mse`` search).
    """
    rows = _sharing(weight, number_format)
    low, high = rows.amin(-1), rows.amax(-1)
    best_scale, best_zero = to_scale(low, high, number_format)
    best = torch.full_like(best_scale, torch.inf)
    for shrink in SHRINKS:
        scale, zero = to_scale(low * shrink, high * shrink, number_format)
        hat = to_grid(rows, scale[..., None], zero[..., None], number_format)
        score = (rows - hat).abs_().pow_(p).mean(-1)
        better = score < best
        best = torch.where(better, score, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _sharing(weight: Tensor, number_format: Format) -> Tensor:
    """The weight [C, ...] as [C, K], or in blocks [C, blocks, block]: weights that share a scale, last."""
    flat = weight.flatten(1)
    return flat.unflatten(1, (-1, number_format.block)) if number_format.block else flat


WEIGHT_FINDERS: dict[str, Callable[[Tensor, Format], tuple[Tensor, Tensor]]] = {
    "minmax": minmax_weights,
    "lp": lp_weights,
}

# -- activations -------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What is kept of a tensor over all calibration rows.

    Attributes:
        per_row: how many values of each row are kept as a sample.
        low: smallest value seen.
        high: largest value seen.
        lows: smallest value of each row.
        highs: largest value of each row.
        timesteps: timestep of each row, where it is known.
        kept: sampled values, [per_row] for each row. Which positions are kept depends on the row's size
            alone, so the sample is the same in any row order.
    """

    per_row: int = 512
    low: float = 0.0
    high: float = 0.0
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def observe(self, x: Tensor, timesteps: Tensor | None = None) -> None:
        """Take in values [rows, ...]; rows may be folded: several, in order, for each of the timesteps."""
        rows = x.detach().reshape(x.shape[0], -1).float()
        size = rows.shape[1]
        lows, highs = rows.amin(1).cpu(), rows.amax(1).cpu()
        self.low, self.high = min(self.low, lows.min().item()), max(self.high, highs.max().item())
        self.lows.append(lows)
        self.highs.append(highs)
        if timesteps is not None:
            self.timesteps.append(timesteps.cpu().repeat_interleave(len(rows) // len(timesteps)))
        if size > self.per_row:
            positions = torch.randint(0, size, (self.per_row,), generator=torch.Generator().manual_seed(size))
            rows = rows[:, positions.to(rows.device)]
        self.kept.append(rows.cpu())

    def groups(self, edges: Tensor) -> list[Summary]:
        """One summary for each group of timesteps; ``edges`` [K - 1], as of `Clock.index`."""
        if not len(edges):
            return [self]
        group = torch.bucketize(torch.cat(self.timesteps), edges)
        return [self._select(group == number) for number in range(len(edges) + 1)]

    def _select(self, rows: Tensor) -> Summary:
        lows, highs, kept = (
            torch.cat(self.lows)[rows],
            torch.cat(self.highs)[rows],
            torch.cat(self.kept)[rows],
        )
        low, high = min(0.0, lows.min().item()), max(0.0, highs.max().item())
        return Summary(self.per_row, low, high, [lows], [highs], kept=[kept])

    def values(self) -> Tensor:
        """The sample as one vector, with the extremes of every row."""
        return torch.cat([*(rows.flatten() for rows in self.kept), *self.lows, *self.highs])


def minmax(summary: Summary, number_format: Format) -> tuple[Tensor, Tensor]:
    """Cover every value that was seen."""
    return to_scale(torch.tensor(summary.low), torch.tensor(summary.high), number_format)


def percentile(summary: Summary, number_format: Format, percent: float = 99.99) -> tuple[Tensor, Tensor]:
    """Cover all but the outermost ``100 - percent`` per cent of the values, at either end."""
    values = summary.values().sort().values
    tail = int((1 - percent / 100) * (len(values) - 1))
    return to_scale(values[tail], values[len(values) - 1 - tail], number_format)


def running(summary: Summary, number_format: Format) -> tuple[Tensor, Tensor]:
    """Mean over rows of each row's extremes: what an exponential average tends to on shuffled rows.

    The reference code averages over batches in the order of the timesteps, which leaves the range of the
    last few; a mean over rows has no order.
    """
    low = torch.cat(summary.lows).double().mean()
    high = torch.cat(summary.highs).double().mean()
    return to_scale(low, high, number_format)


def lp(summary: Summary, number_format: Format, p: float = 2.4) -> tuple[Tensor, Tensor]:
    """The range, shrunk to minimise the mean of ``|x - x_hat|**p`` over the sample (as `lp_weights`)."""
    values = summary.values()
    low, high = torch.tensor(summary.low), torch.tensor(summary.high)
    scores = []
    for shrink in SHRINKS:
        scale, zero = to_scale(low * shrink, high * shrink, number_format)
        hat = to_grid(values, scale, zero, number_format)
        scores.append((values - hat).abs_().pow_(p).mean())
    shrink = SHRINKS[int(torch.stack(scores).argmin())]
    return to_scale(low * shrink, high * shrink, number_format)


ACTIVATION_FINDERS: dict[str, Callable[[Summary, Format], tuple[Tensor, Tensor]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "running": running,
    "lp": lp,
}


def check_finder(name: str, finders: dict[str, Callable[..., tuple[Tensor, Tensor]]]) -> None:
    """Refuse an unknown finder.

    Raises:
        UsageError: ``name`` is not among ``finders``.
    """
    if name not in finders:
        raise UsageError(f"unknown range finder {name!r}: choose from {', '.join(finders)}")
