"""Groups of channels or tokens that share a range (DGQ, arXiv 2501.04304): extremes, clusters, spans.

A few outliers decide the range of a tensor; they sit in fixed channels, or in fixed tokens or pixels. What is
grouped is an index set: the pairs (min, max) of its members are close to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.network.current_timestep import attach_current_timestep
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import PIXELS, ROWS, shifted

CHANNELS, TOKENS = "channels", "tokens"
_STARTS, _ROUNDS = 8, 100
_SMALLEST = 1e-4  # of the tensor's range; what is below has hardly been seen at all

_Extremes = dict[str, tuple[Tensor, Tensor]]


# -- what a tensor looks like along its dimensions -----------------------------------------------------------


@dataclass
class Spread:
    """Extremes of a tensor along one dimension, at every timestep.

    Attributes:
        low: [T, A] smallest values; infinite where nothing was seen.
        high: [T, A] largest values.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, timesteps: int, size: int) -> Spread:
        """Nothing seen yet."""
        return cls(torch.full((timesteps, size), torch.inf), torch.full((timesteps, size), -torch.inf))

    def observe(self, low: Tensor, high: Tensor, place: Tensor) -> None:
        """Take in the extremes [rows, A] of rows whose timesteps have the numbers ``place`` [rows]."""
        where = place[:, None].expand(-1, low.shape[1])
        self.low.scatter_reduce_(0, where, low.float().cpu(), "amin")
        self.high.scatter_reduce_(0, where, high.float().cpu(), "amax")

    def difference(self) -> Tensor:
        """``sum_t D`` with ``D = (max_i max - min_i max) + (max_i min - min_i min)``, i along the dimension.

        DGQ groups along the dimension in which D is larger; its code decides anew at every timestep, here
        all of them decide together.
        """
        seen = self.low[:, 0] <= self.high[:, 0]
        low, high = self.low[seen], self.high[seen]
        return (high.amax(1) - high.amin(1) + low.amax(1) - low.amin(1)).double().sum()


def extremes(inner: nn.Module | None, x: Tensor) -> _Extremes:
    """Smallest and largest values of each row of a layer's input along its dimensions, each [rows, A].

    ``channels`` always; ``tokens`` for sequences, and for operands of attention [rows, heads, tokens, d], which
    have no layer; for convolutions what DGQ's code sees after im2col: a row for each channel and kernel position,
    zero padding included, and an output pixel for each column.
    """
    if inner is None:
        return {CHANNELS: (x.amin((1, 2)), x.amax((1, 2))), TOKENS: (x.amin((1, 3)), x.amax((1, 3)))}
    if isinstance(inner, nn.Linear):
        if x.ndim == 2:
            return {CHANNELS: (x, x)}
        middle = tuple(range(1, x.ndim - 1))
        found = {CHANNELS: (x.amin(middle), x.amax(middle))}
        return found | ({TOKENS: (x.amin(-1), x.amax(-1))} if x.ndim == 3 else {})
    space = tuple(range(2, x.ndim))
    found = {CHANNELS: (x.amin(space), x.amax(space))}
    if isinstance(inner, nn.Conv2d) and x.ndim == 4:
        found |= _im2col_extremes(inner, x)
    return found


def _im2col_extremes(inner: nn.Conv2d, x: Tensor) -> _Extremes:
    rows, pixels = [], []
    for _, _, seen in shifted(inner, x):
        rows.append(torch.stack([seen.amin((2, 3)), seen.amax((2, 3))]))
        pixels.append(torch.stack([seen.amin(1).flatten(1), seen.amax(1).flatten(1)]))
    low, high = torch.cat(rows, 2)
    every = torch.stack(pixels)
    return {ROWS: (low, high), PIXELS: (every[:, 0].amin(0), every[:, 1].amax(0))}


class InputSpreads:
    """Collects the extremes and the mean square of one layer's input over all calibration rows.

    Args:
        inner: the layer, or None for an operand of attention.
        timesteps: all that will be seen, ascending.
    """

    def __init__(self, inner: nn.Module | None, timesteps: Tensor) -> None:
        self.inner, self.timesteps = inner, timesteps
        self.spreads: dict[str, Spread | None] = {}
        self.square, self.count = torch.zeros(()), 0

    def observe(self, x: Tensor, now: Tensor) -> None:
        """Take in an input [rows, ...] at timesteps [rows], or [1] for all rows alike."""
        now = now.cpu().repeat_interleave(len(x) // len(now))
        place = torch.searchsorted(self.timesteps, now)
        for name, (low, high) in extremes(self.inner, x).items():
            size = low.shape[1]
            if name not in self.spreads:
                self.spreads[name] = Spread.empty(len(self.timesteps), size)
            spread = self.spreads[name]
            if spread is not None and spread.low.shape[1] == size:
                spread.observe(low, high, place)
            else:
                self.spreads[name] = None  # another size than before: nothing is fixed along it
        last = self.inner is None or isinstance(self.inner, nn.Linear)
        features = x if last else x.transpose(1, -1)
        flat = features.reshape(-1, features.shape[-1])
        self.square = self.square + flat.square().sum(0).cpu().double()
        self.count += len(flat)

    def tensors(self) -> dict[str, Tensor]:
        """``DIMENSION.{low,high}`` [A] over all timesteps, ``DIMENSION.difference``, and ``square`` [C]."""
        found = {"square": self.square / max(1, self.count)}
        for name, spread in self.spreads.items():
            if spread is not None:
                found[f"{name}.low"], found[f"{name}.high"] = spread.low.amin(0), spread.high.amax(0)
                found[f"{name}.difference"] = spread.difference()
        return found


def input_spreads(
    session: Session,
    modules: Mapping[str, nn.Module],
    mode: Callable[[], AbstractContextManager[None]],
    what: str,
) -> dict[str, Tensor]:
    """What some tensors look like over the calibration rows; names are ``PATH:NAME``.

    Args:
        session: the calibration.
        modules: quantized layers whose inputs are looked at, and quantizers of attention's operands, by path.
        mode: of the network, such as ``session.teacher``.
        what: for the progress bar.
    """
    timesteps = session.data.timesteps[session.rows()].float().unique()
    found = {
        path: InputSpreads(module.inner if isinstance(module, QuantizedLayer) else None, timesteps)
        for path, module in modules.items()
    }
    current = attach_current_timestep(session.denoiser)

    def before(call: ModuleCall) -> None:
        assert current.now is not None
        found[call.name].observe(call.input, current.now)

    observe_rows(session, modules, what, before=before, mode=mode)
    return {f"{path}:{name}": value for path, seen in found.items() for name, value in seen.tensors().items()}


def of_layer(measured: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """What `input_spreads` found for one layer, by name."""
    return {name.rpartition(":")[2]: x for name, x in measured.items() if name.rpartition(":")[0] == path}


def chosen_dimension(found: Mapping[str, Tensor], dimensions: Iterable[str]) -> str | None:
    """The dimension with the largest difference; None if nothing was seen along any of them."""
    known = [name for name in dimensions if f"{name}.difference" in found]
    return max(known, key=lambda name: float(found[f"{name}.difference"]), default=None)


# -- clusters ------------------------------------------------------------------------------------------------


def cluster(low: Tensor, high: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """K-means of the pairs (min, max), started as k-means++ does, the best of a few starts.

    Args:
        low: [A] smallest values.
        high: [A] largest values.
        groups: how many clusters, at most.
        generator: decides the starts.

    Returns:
        [A] int64, numbers of clusters; none is empty, and they are numbered by their widest member, the
        narrowest first.
    """
    points, kind = torch.stack([low, high], 1).double().unique(dim=0, return_inverse=True)
    if len(points) <= groups:
        labels = kind
    else:
        weight = torch.bincount(kind).double()
        starts = (_lloyd(points, weight, groups, generator) for _ in range(_STARTS))
        labels = min(starts, key=lambda found: found[0])[1][kind]
    labels = labels.unique(return_inverse=True)[1]
    spans = torch.maximum(-low, high).double()
    widest = torch.zeros(int(labels.max()) + 1, dtype=spans.dtype)
    order = widest.scatter_reduce(0, labels, spans, "amax").argsort(stable=True)
    numbered: Tensor = order.argsort()[labels]
    return numbered


def _lloyd(points: Tensor, weight: Tensor, groups: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """One run of k-means on distinct points [N, 2]: its inertia and labels [N]."""
    first = int(torch.multinomial(weight, 1, generator=generator))
    centres = points[first : first + 1]
    for _ in range(groups - 1):
        away = weight * _distances(points, centres).amin(1)
        centres = torch.cat([centres, points[torch.multinomial(away, 1, generator=generator)]])
    labels = _distances(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        member = nn.functional.one_hot(labels, groups).double() * weight[:, None]
        count = member.sum(0)
        centres = torch.where(
            count[:, None] > 0, member.T @ points / count[:, None].clamp(min=1e-30), centres
        )
        after = _distances(points, centres).argmin(1)
        if torch.equal(after, labels):
            break
        labels = after
    return float((weight * _distances(points, centres).amin(1)).sum()), labels


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    return (points[:, None] - centres[None]).square().sum(-1)


def relative_spans(low: Tensor, high: Tensor, labels: Tensor, symmetric: bool) -> Tensor:
    """How much of the tensor's range each index's group needs, [A] in (0, 1]; the widest group has 1.

    Ranges include zero, so that zero stays a code of its own and its zero point within the codes.

    Args:
        low: [A] smallest values.
        high: [A] largest values.
        labels: [A] the group of each.
        symmetric: whether codes reach as far down as up.
    """
    groups = torch.zeros(int(labels.max()) + 1, dtype=low.dtype)
    lows, highs = (
        groups.scatter_reduce(0, labels, low, "amin"),
        groups.scatter_reduce(0, labels, high, "amax"),
    )
    down, up = -lows, highs
    if symmetric:
        down = up = torch.maximum(down, up)
    tiny = torch.finfo(low.dtype).tiny
    spans = torch.maximum(down / down.amax().clamp(min=tiny), up / up.amax().clamp(min=tiny))
    if not (spans > 0).any():
        return torch.ones_like(low)
    return spans.clamp(min=_SMALLEST)[labels]
