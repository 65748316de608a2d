"""Groups of timesteps with activation scales of their own.

Ranges of activations drift over the trajectory (TFMQ-DM, arXiv 2311.16503, section 3.2; DGQ, arXiv
2501.04304, keep scales for every timestep). Contiguous groups keep the gain and need a handful of scales.

The ranges themselves are kept in ``ranges.safetensors``, in a calibration set for the inputs of all weighted
layers and in a checkpoint's component for all quantized tensors:

    timesteps         [T] ascending
    NAME.low          [T] smallest value at each timestep
    NAME.high         [T] largest value
    order             [Q] int64, place in the order of execution of each NAME, names in alphabetical order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qdeploy.calibrate.ranges import Summary
from qdeploy.clock import midpoints
from qdeploy.errors import UsageError

RANGES = "ranges.safetensors"


def check_groups(groups: int | tuple[float, ...], timesteps: Tensor) -> None:
    """Make sure that every group has timesteps to be calibrated at.

    Args:
        groups: as in a recipe.
        timesteps: those of the calibration rows, any shape.

    Raises:
        UsageError: there are more groups than timesteps, or nothing lies between two boundaries.
    """
    seen = timesteps.float().unique()
    if isinstance(groups, int):
        if groups > len(seen):
            raise UsageError(
                f"{groups} groups of timesteps cannot be told apart by {len(seen)} calibrated timesteps: "
                f"choose at most {len(seen)}, or collect with more --steps"
            )
        return
    counts = torch.bincount(torch.bucketize(seen, torch.tensor(groups)), minlength=len(groups) + 1)
    if (counts == 0).any():
        bounds = ["the lowest", *(f"{bound:g}" for bound in groups), "the highest"]
        empty = int((counts == 0).nonzero()[0])
        raise UsageError(
            f"no calibrated timestep lies between {bounds[empty]} and {bounds[empty + 1]}: the calibration set "
            f"has {len(seen)} from {seen[0]:g} to {seen[-1]:g}"
        )


def find_edges(groups: int | tuple[float, ...], ranges: Mapping[str, Tensor]) -> Tensor:
    """Edges [K - 1] between the groups.

    Args:
        groups: how many, or the largest timestep of each group but the last.
        ranges: as of `ranges_by_timestep`.
    """
    if not isinstance(groups, int):
        return torch.tensor(groups)
    cuts = best_cuts(spans(ranges), groups) if tensor_names(ranges) else []
    return (
        midpoints(ranges["timesteps"])[torch.tensor(cuts, dtype=torch.int64) - 1] if cuts else torch.zeros(0)
    )


def best_cuts(spans: Tensor, groups: int) -> list[int]:
    """Where contiguous groups should begin, so that rounding noise is least.

    Noise of a quantizer grows with the square of its step, and the step of a group with the largest range in
    it. The sum over quantizers of noise, each relative to its noise with one scale for all, is minimised
    exactly, by dynamic programming.

    Args:
        spans: [Q, T], the largest magnitude that each quantizer sees at each timestep.
        groups: K, at most T.

    Returns:
        The first positions of the groups but the first, K - 1 numbers.
    """
    relative = spans / spans.amax(1, keepdim=True).clamp(min=torch.finfo(spans.dtype).tiny)
    count = spans.shape[1]
    cost = torch.full((count, count + 1), torch.inf, dtype=torch.float64)
    for first in range(count):
        largest = relative[:, first:].cummax(1).values.double()
        cost[first, first + 1 :] = largest.square().sum(0) * torch.arange(1, count - first + 1)
    best = cost[0].clone()  # best[j]: least cost of the first j timesteps in the groups so far
    choices = []
    for _ in range(groups - 1):
        total = best[:count, None] + cost
        best, chosen = total.min(0)
        choices.append(chosen)
    cuts, end = [], count
    for chosen in reversed(choices):
        end = int(chosen[end])
        cuts.append(end)
    return sorted(cuts)


def ranges_by_timestep(summaries: Mapping[str, Summary]) -> dict[str, Tensor]:
    """Smallest and largest value of every tensor at every timestep.

    Args:
        summaries: of each tensor by its name, with timesteps; in the order of execution.

    Returns:
        What ``ranges.safetensors`` holds.
    """
    every = [torch.cat(summary.timesteps) for summary in summaries.values()]
    distinct = torch.cat(every).unique() if every else torch.zeros(0)
    ranges = {"timesteps": distinct}
    for name, summary in summaries.items():
        place = torch.searchsorted(distinct, torch.cat(summary.timesteps))
        for what, seen, mode in (("low", summary.lows, "amin"), ("high", summary.highs, "amax")):
            target = torch.zeros(len(distinct))
            ranges[f"{name}.{what}"] = target.scatter_reduce(
                0, place, torch.cat(seen), mode, include_self=False
            )
    places = {name: place for place, name in enumerate(summaries)}
    ranges["order"] = torch.tensor([places[name] for name in sorted(places)], dtype=torch.int64)
    return ranges


def merge_ranges(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The ranges over all parts, each as of `ranges_by_timestep` and of the same tensors."""
    summaries = {
        name: Summary(
            lows=[part[f"{name}.low"] for part in parts],
            highs=[part[f"{name}.high"] for part in parts],
            timesteps=[part["timesteps"] for part in parts],
        )
        for name in tensor_names(parts[0])
    }
    return ranges_by_timestep(summaries)


def tensor_names(ranges: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors in the order of execution; in alphabetical order where that was not kept."""
    names = sorted(key.removesuffix(".low") for key in ranges if key.endswith(".low"))
    order = ranges.get("order")
    return names if order is None else [names[place] for place in order.argsort().tolist()]


def spans(ranges: Mapping[str, Tensor]) -> Tensor:
    """[Q, T] the largest magnitude of each tensor at each timestep, tensors as of `tensor_names`."""
    pairs = [(ranges[f"{name}.low"], ranges[f"{name}.high"]) for name in tensor_names(ranges)]
    return torch.stack([torch.maximum(-low, high) for low, high in pairs])


def read_ranges(folder: Path) -> dict[str, Tensor] | None:
    """The ranges over time that lie in a calibration set or in a component's folder, if they do."""
    from safetensors.torch import load_file

    return load_file(folder / RANGES) if (folder / RANGES).is_file() else None
