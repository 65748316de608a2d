"""The part of a network that depends on the timestep alone, as a function that can be called by itself.

A `Tape` records every operation of one forward pass whose inputs come from the timestep alone. The
`TimePart` made from it repeats these operations for other timesteps, through the network's own layers:
the temporal features of all timesteps, without the cost of the network (TFMQ-DM, arXiv 2311.16503,
section 3.1: the time embedding h and the embedding projections g_i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from qdeploy.network.current_timestep import current_timestep_of


@dataclass(frozen=True)
class Slot:
    """The index of a value on the tape; 0 is the timestep."""

    number: int


@dataclass(frozen=True)
class Step:
    """One operation: a function, or a layer by its path. Tensors of the tape among its arguments are slots."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Slot | None, ...]


@dataclass(frozen=True)
class TimePart:
    """The operations that depend on the timestep alone.

    Attributes:
        layers: paths of its layers, in execution order.
        features: those of them whose outputs the rest of the network reads.
    """

    layers: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    _steps: tuple[Step, ...] = ()
    _outputs: tuple[Slot, ...] = ()

    def __call__(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """All features at some timesteps, as the network in its present state computes them.

        Args:
            denoiser: the network; its layers may have been replaced since the tape was made.
            timesteps: [T], in a dtype that the network takes.

        Returns:
            [T, ...] for each feature. One timestep at a time: bit for bit what the network computes for
            one row.
        """
        functions = self._functions(denoiser)
        rows = [self._run(denoiser, functions, timesteps[i : i + 1]) for i in range(len(timesteps))]
        columns = (torch.cat(column) for column in zip(*rows, strict=True))
        return dict(zip(self.features, columns, strict=True))

    def together(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """As `__call__`, in one batch: fast, differentiable, and equal except for the last digits."""

        functions = self._functions(denoiser)

        def one(timestep: Tensor) -> tuple[Tensor, ...]:
            return self._run(denoiser, functions, timestep[None])

        batched = torch.func.vmap(one)(timesteps)
        return {name: value[:, 0] for name, value in zip(self.features, batched, strict=True)}

    def _functions(self, denoiser: nn.Module) -> list[Callable[..., Any]]:
        """What each step calls."""
        return [
            denoiser.get_submodule(step.function) if isinstance(step.function, str) else step.function
            for step in self._steps
        ]

    def _run(
        self, denoiser: nn.Module, functions: Sequence[Callable[..., Any]], timestep: Tensor
    ) -> tuple[Tensor, ...]:
        current = current_timestep_of(denoiser)
        if current is None:
            return self._replay(functions, timestep)
        with current.at(timestep):
            return self._replay(functions, timestep)

    def _replay(self, functions: Sequence[Callable[..., Any]], timestep: Tensor) -> tuple[Tensor, ...]:
        values: dict[int, Any] = {0: timestep}

        def fill(value: Any) -> Any:
            if isinstance(value, Slot):
                return values[value.number]
            return tree_map(fill, value) if isinstance(value, tuple | list | dict) else value

        for step, function in zip(self._steps, functions, strict=True):
            result = function(*map(fill, step.args), **{name: fill(x) for name, x in step.kwargs.items()})
            leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
            for slot, leaf in zip(step.results, leaves, strict=True):
                if slot is not None:
                    values[slot.number] = leaf
        return tuple(values[slot.number] for slot in self._outputs)


@dataclass
class Tape:
    """A record of one forward pass of one row.

    Args:
        timestep: the tensor that the network is given as timestep.
        others: every other tensor that it is given.
    """

    timestep: Tensor
    others: Sequence[Tensor]
    _slots: Any = field(default_factory=WeakIdKeyDictionary)
    _foreign: Any = field(default_factory=WeakIdKeyDictionary)
    _steps: list[Step] = field(default_factory=list)
    _count: int = 0
    _frontier: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._slots[self.timestep] = Slot(0)
        for tensor in self.others:
            self._foreign[tensor] = True

    def record(
        self,
        function: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Record an operation, if its inputs come from the timestep alone. What comes from no input is a constant."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor in self._foreign for tensor in given):
            self._frontier |= {self._slots[tensor].number for tensor in given if tensor in self._slots}
            for leaf in leaves:
                self._foreign[leaf] = True
        elif leaves and (any(tensor in self._slots for tensor in given) or isinstance(function, str)):
            self._write(function, args, kwargs, result)

    def _write(
        self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        def cut(leaf: Any) -> Any:
            return self._slots.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

        flat, spec = tree_flatten((args, kwargs))
        cut_args, cut_kwargs = tree_unflatten([cut(leaf) for leaf in flat], spec)
        results: list[Slot | None] = []
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                results.append(None)
                continue
            self._count += 1
            self._slots[leaf] = Slot(self._count)
            results.append(Slot(self._count))
        self._steps.append(Step(function, cut_args, cut_kwargs, tuple(results)))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a value comes from the timestep alone."""
        return tensor in self._slots

    def time_part(self, output: Any, temporal: set[str]) -> TimePart:
        """The part that leads to features.

        Args:
            output: what the network returned: a feature may be read by nothing else.
            temporal: paths of the layers that were found to depend on the timestep alone.
        """
        made = {slot.number: step for step in self._steps for slot in step.results if slot is not None}
        ends = self._frontier | {self._slots[t].number for t in tree_leaves(output) if self._is_held(t)}
        features: dict[str, int] = {}
        seen: set[int] = set()
        pending = list(ends)
        while pending:
            number = pending.pop()
            step = made.get(number)
            if step is None or number in seen:
                continue
            seen.add(number)
            if isinstance(step.function, str) and step.function in temporal:
                first = features.get(
                    step.function, number
                )  # a layer may be called again: with the same result
                features[step.function] = min(first, number)
            else:
                pending += [leaf.number for leaf in _slots_of(step)]
        needed: set[int] = set()
        pending = list(features.values())
        while pending:
            number = pending.pop()
            if number in made and number not in needed:
                needed |= {slot.number for slot in made[number].results if slot is not None}
                pending += [leaf.number for leaf in _slots_of(made[number])]
        steps = tuple(
            step for step in self._steps if any(slot and slot.number in needed for slot in step.results)
        )
        layers = tuple(dict.fromkeys(step.function for step in steps if isinstance(step.function, str)))
        names = tuple(path for path in layers if path in features)
        return TimePart(layers, names, steps, tuple(Slot(features[name]) for name in names))

    def _is_held(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf in self._slots


def _slots_of(step: Step) -> list[Slot]:
    return [leaf for leaf in tree_leaves((step.args, step.kwargs)) if isinstance(leaf, Slot)]
