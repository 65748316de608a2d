"""Which parts of a network read what another part returns: found by running it, whatever its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qdeploy.model.inputs import denoise
from qdeploy.network.observe import ModuleCall, observing, standing_in

END = ""  # reads what becomes the network's output


def readers_of(
    denoiser: nn.Module, units: Mapping[str, nn.Module], inputs: dict[str, Tensor]
) -> dict[str, set[str]]:
    """By unit, which units read directly what it returns, and `END` where it becomes the network's output.

    The network runs once, then once more for each unit without any of them: one returns NaN, the others what they
    returned before. What NaN comes to has read it.

    Args:
        denoiser: the network.
        units: parts of it that do not contain each other, by name.
        inputs: of the network, for one row.

    Returns:
        For the units that are called exactly once.
    """
    outputs: dict[str, Any] = {}
    calls: Counter[str] = Counter()

    def after(call: ModuleCall) -> None:
        calls[call.name] += 1
        outputs[call.name] = tree_map(_copy, call.output)

    with torch.no_grad(), observing(units, after=after):
        denoise(denoiser, inputs)
    once = {name: module for name, module in units.items() if calls[name] == 1}
    found: dict[str, set[str]] = {}
    for unit in once:
        readers = found[unit] = set()

        def before(call: ModuleCall, readers: set[str] = readers) -> None:
            if _has_nan((call.args, call.kwargs)):
                readers.add(call.name)

        def output(name: str, unit: str = unit) -> Any:
            return tree_map(_nan if name == unit else _copy, outputs[name])

        with torch.no_grad(), standing_in(once, output), observing(units, before):
            if _has_nan(denoise(denoiser, inputs)):
                readers.add(END)
    return found


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _nan(leaf: Any) -> Any:
    return torch.full_like(leaf, torch.nan) if _is_float(leaf) else _copy(leaf)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _has_nan(tree: Any) -> bool:
    return any(bool(leaf.isnan().any()) for leaf in tree_leaves(tree) if _is_float(leaf))
