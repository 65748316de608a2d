"""Denoiser inputs of one batch of images, gathered call by call and packed into a shard.

The form of a shard is described in `qdeploy.calibration_set.shards`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qdeploy.calibration_set.shards import finite
from qdeploy.system.errors import InvalidInputError


class Batch:
    """The inputs recorded for one batch of images, on their way into a shard.

    Args:
        sample: name of the input that holds the noisy sample.
        images: number of the image that each row of the batch belongs to, ``[B]``.
        conditional: which rows are conditional, ``[B]``, if that is known.
        shared: names of inputs that are given once for all rows. By default those that have not B rows are.

    Attributes:
        conditional_branch: which of two calls a step is the conditional one, if that is known.
    """

    def __init__(
        self,
        sample: str,
        images: Tensor,
        conditional: Tensor | None = None,
        shared: frozenset[str] = frozenset(),
    ) -> None:
        self.sample, self.images, self.conditional, self.shared = sample, images, conditional, shared
        self.calls: list[int] = []
        self.branches: list[int] = []
        self.inputs: list[dict[str, Tensor]] = []
        self.conditional_branch: int | None = None

    def add(self, call: int, inputs: Mapping[str, Tensor], branch: int = 0) -> None:
        """Keep the inputs of a call; what is as it was in the call before takes no further memory.

        Args:
            call: number of the step in the trajectory.
            inputs: by flat name.
            branch: which call of the step it is.

        Raises:
            InvalidInputError: they hold NaN or Inf, or are not the inputs that earlier calls had.
        """
        # of the same branch, where there are several
        before = next(
            (old for b, old in zip(self.branches[::-1], self.inputs[::-1], strict=True) if b == branch), {}
        )
        if before and before.keys() != inputs.keys():
            raise InvalidInputError(f"call {call} of the denoiser has other inputs than the calls before it")
        kept = {}
        for name, value in inputs.items():
            value = value.detach().cpu()
            if not finite(value):
                raise InvalidInputError(
                    f"the full-precision model itself is broken: {name!r} holds NaN or Inf in call {call}"
                )
            same = name in before and _equal(before[name], value)
            kept[name] = before[name] if same else value.clone()
        self.calls.append(call)
        self.branches.append(branch)
        self.inputs.append(kept)

    def pack(self) -> dict[str, Tensor]:
        """The tensors of the shard.

        Raises:
            InvalidInputError: an input has a form that a calibration set cannot hold.
        """
        key = self.images * 2 + (0 if self.conditional is None else (~self.conditional).long())
        order, calls = key.argsort(stable=True), len(self.calls)
        packed = {
            "image": self.images[order].repeat(calls),
            "call": torch.tensor(self.calls).repeat_interleave(len(order)),
        }
        if any(self.branches):
            packed["branch"] = torch.tensor(self.branches).repeat_interleave(len(order))
        if self.conditional is not None:
            packed["conditional"] = self.conditional[order].repeat(calls)
        elif self.conditional_branch is not None:
            packed["conditional"] = packed["branch"] == self.conditional_branch
        conditions: list[dict[str, Tensor]] = [{} for _ in range(max(self.branches) + 1)]
        for name in self.inputs[0]:
            values = [call[name] for call in self.inputs]
            if name == "timestep":
                values = [_expanded(value, len(order)) for value in values]
            batched = name not in self.shared and values[0].ndim > 0 and len(values[0]) == len(order)
            first = dict(zip(self.branches[::-1], values[::-1], strict=True))
            constant = all(_equal(value, first[b]) for b, value in zip(self.branches, values, strict=True))
            if name in (self.sample, "timestep") or (batched and not constant):
                packed[f"input.{name}"] = torch.cat([value[order] for value in values])
            elif batched:
                for branch, value in first.items():
                    conditions[branch][name] = value[order]
            elif constant and all(_equal(value, values[0]) for value in first.values()):
                packed[f"shared.{name}"] = values[0]
            else:
                raise InvalidInputError(f"the denoiser's input {name!r} changes, but has no batch dimension")
        if conditions[0]:
            together = {name: torch.cat([of[name] for of in conditions]) for name in conditions[0]}
            chosen, index = _distinct(list(together.values()))
            packed |= {f"condition.{name}": value[chosen] for name, value in together.items()}
            rows = index.reshape(len(conditions), len(order))
            packed["condition_row"] = torch.cat([rows[branch] for branch in self.branches])
        return packed


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _expanded(timestep: Tensor, rows: int) -> Tensor:
    if timestep.numel() not in (1, rows):
        raise InvalidInputError(f"the timestep has shape {list(timestep.shape)}: one t per row is needed")
    return timestep.reshape(-1).expand(rows)


def _distinct(columns: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """First row of each distinct value that the columns take together, and for each row which it is."""
    found: dict[bytes, int] = {}
    chosen: list[int] = []
    index: list[int] = []
    for row in range(len(columns[0])):
        digest = hashlib.sha256()
        for column in columns:
            digest.update(column[row].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if digest.digest() not in found:
            found[digest.digest()] = len(chosen)
            chosen.append(row)
        index.append(found[digest.digest()])
    return chosen, torch.tensor(index)
