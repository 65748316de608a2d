"""Ranges of tensors by timestep: how they are made, merged, and read from an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qdeploy.quant.activation_statistics import RowExtremes
from qdeploy.store.artifact import CalibrationFolder, DenoiserArtifact


def ranges_by_timestep(seen: Mapping[str, RowExtremes]) -> dict[str, Tensor]:
    """Smallest and largest value of every tensor at every timestep.

    Args:
        seen: of each tensor by its name, with timesteps; in the order of execution.

    Returns:
        What ``ranges.safetensors`` holds.
    """
    timesteps = {name: torch.cat(extremes.timesteps) for name, extremes in seen.items()}
    distinct = torch.cat(list(timesteps.values())).unique() if timesteps else torch.zeros(0)
    ranges = {"timesteps": distinct}
    for name, extremes in seen.items():
        place = torch.searchsorted(distinct, timesteps[name])
        for what, values, mode in zip(("low", "high"), extremes.joined(), ("amin", "amax"), strict=True):
            target = torch.zeros(len(distinct))
            ranges[f"{name}.{what}"] = target.scatter_reduce(0, place, values, mode, include_self=False)
    places = {name: place for place, name in enumerate(seen)}
    ranges["order"] = torch.tensor([places[name] for name in sorted(places)], dtype=torch.int64)
    return ranges


def merge_ranges(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The ranges over all parts, each from `ranges_by_timestep` and of the same tensors."""
    return ranges_by_timestep(
        {
            name: RowExtremes(
                [part[f"{name}.low"] for part in parts],
                [part[f"{name}.high"] for part in parts],
                [part["timesteps"] for part in parts],
            )
            for name in tensor_names(parts[0])
        }
    )


def tensor_names(ranges: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors in the order of execution; in alphabetical order where that was not kept."""
    names = sorted(key.removesuffix(".low") for key in ranges if key.endswith(".low"))
    order = ranges.get("order")
    return names if order is None else [names[place] for place in order.argsort().tolist()]


def spans(ranges: Mapping[str, Tensor]) -> Tensor:
    """[Q, T] the largest magnitude of each tensor at each timestep, tensors in the order of `tensor_names`."""
    pairs = [(ranges[f"{name}.low"], ranges[f"{name}.high"]) for name in tensor_names(ranges)]
    return torch.stack([torch.maximum(-low, high) for low, high in pairs])


def read_ranges(artifact: CalibrationFolder | DenoiserArtifact) -> dict[str, Tensor] | None:
    """The ranges over time that a calibration set or a checkpoint has kept, if it has."""
    from safetensors.torch import load_file

    return None if artifact.ranges is None else load_file(artifact.ranges)
