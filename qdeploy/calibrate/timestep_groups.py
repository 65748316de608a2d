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

from collections.abc import Mapping

import torch
from torch import Tensor

from qdeploy.network.current_timestep import midpoints
from qdeploy.quant.time_ranges import spans, tensor_names
from qdeploy.system.errors import UsageError


def check_groups(groups: int | tuple[float, ...], timesteps: Tensor) -> None:
    """Check that every group has timesteps to be calibrated at.

    Args:
        groups: as in a recipe.
        timesteps: those of the calibration rows, any shape.

    Raises:
        UsageError: there are more groups than timesteps, or there is no timestep between two boundaries.
    """
    seen = timesteps.float().unique()
    if isinstance(groups, int):
        if groups > len(seen):
            raise UsageError(
                f"{groups} groups of timesteps cannot be distinguished by {len(seen)} calibrated timesteps: "
                f"choose at most {len(seen)}, or collect with more --steps"
            )
        return
    counts = torch.bincount(torch.bucketize(seen, torch.tensor(groups)), minlength=len(groups) + 1)
    if (counts == 0).any():
        bounds = ["the lowest", *(f"{bound:g}" for bound in groups), "the highest"]
        empty = int((counts == 0).nonzero()[0])
        raise UsageError(
            f"there is no calibrated timestep between {bounds[empty]} and {bounds[empty + 1]}: the calibration set "
            f"has {len(seen)} from {seen[0]:g} to {seen[-1]:g}"
        )


def find_edges(groups: int | tuple[float, ...], ranges: Mapping[str, Tensor]) -> Tensor:
    """Edges [K - 1] between the groups.

    Args:
        groups: how many, or the largest timestep of each group but the last.
        ranges: from `ranges_by_timestep`.
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
