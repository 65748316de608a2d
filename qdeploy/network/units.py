"""Reconstruction units of a network."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_units(denoiser: nn.Module, weighted: set[str]) -> list[str]:
    """Paths of the reconstruction units: the smallest modules that are built from layers.

    A module that holds a list of blocks is a frame and is opened; a block, whose parts are layers, is one
    unit (a residual block, an attention, a transformer block); a layer outside of any block is its own.
    """

    def count(prefix: str) -> int:
        return sum(path == prefix or path.startswith(f"{prefix}.") for path in weighted)

    def is_frame(module: nn.Module, prefix: str) -> bool:
        for path, inner in module.named_modules(prefix=prefix):
            if isinstance(inner, _CONTAINERS):
                blocks = [f"{path}.{name}" for name, _ in inner.named_children()]
                if any(count(block) > 1 for block in blocks):
                    return True
        return False

    units: list[str] = []

    def descend(module: nn.Module, prefix: str) -> None:
        if prefix and count(prefix) == 0:
            return
        called = prefix and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if called and (prefix in weighted or not is_frame(module, prefix)):
            units.append(prefix)
            return
        for name, child in module.named_children():
            descend(child, f"{prefix}.{name}" if prefix else name)

    descend(denoiser, "")
    return units
