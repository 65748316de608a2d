"""Coverage profiles: which layers are quantized, by role.

A result means little without its coverage, so the profile is part of every recipe and artifact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qdeploy.network.roles import Layer, Structure
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class Coverage:
    """Which roles are quantized.

    Attributes:
        name: the word that recipes use.
        description: one line for people.
        ends: the first layer that sees the sample, and the last of the network.
        temporal: the layers that depend on the timestep alone.
        attention: the operands of the attention products and the softmax output.
        split: quantize the two halves of a concatenation on their own.
        shortcuts: the shortcuts of blocks, and layers that lower the resolution.
        second: the inputs of the layers that read the outputs of the first float ones.
        attends: the layers of modules that attend and of their transformer blocks.
        target: the one that is meant where none is named.
    """

    name: str
    description: str
    ends: bool
    temporal: bool
    attention: bool
    split: bool
    shortcuts: bool = True
    second: bool = True
    attends: bool = True
    target: str = "portable"


COVERAGES = {
    coverage.name: coverage
    for coverage in (
        Coverage(
            "portable",
            "all convolutions and linear layers but the first, the last and the time path; split shortcuts",
            ends=False,
            temporal=False,
            attention=False,
            split=True,
        ),
        Coverage(
            "portable-joint",
            "as portable, with one scale for both halves of a concatenation: the split's control group",
            ends=False,
            temporal=False,
            attention=False,
            split=False,
        ),
        Coverage(
            "portable-time",
            "as portable, and the time path: for methods that calibrate it",
            ends=False,
            temporal=True,
            attention=False,
            split=True,
        ),
        Coverage(
            "portable-attention",
            "as portable, and attention's products: faster where tokens are many, at some error",
            ends=False,
            temporal=False,
            attention=True,
            split=True,
            target="openvino",
        ),
        Coverage(
            "every-layer",
            "all convolutions and linear layers, the first, the last and the time path too; split shortcuts",
            ends=True,
            temporal=True,
            attention=False,
            split=True,
        ),
        Coverage(
            "tfmq-paper",
            "what TFMQ-DM's code covers: the time path but its first layer, no shortcuts, no downsampling",
            ends=False,
            temporal=True,
            attention=False,
            split=False,
            shortcuts=False,
            second=False,
        ),
        Coverage(
            "dgq-paper",
            "what DGQ's code covers: all but the first and the last layer, q, k, v and the softmax output",
            ends=False,
            temporal=True,
            attention=True,
            split=False,
            target="simulated",
        ),
        Coverage(
            "qdiffusion-paper",
            "what Q-Diffusion's code covers: every layer, q, k, v and the softmax output; simulated",
            ends=True,
            temporal=True,
            attention=True,
            split=True,
            target="simulated",
        ),
        Coverage(
            "quest-paper",
            "what QuEST's code covers without --split: every layer, q, k, v and the softmax output; simulated",
            ends=True,
            temporal=True,
            attention=True,
            split=False,
            target="simulated",
        ),
        Coverage(
            "qncd-paper",
            "what QNCD's code covers: every layer but those of attention and of its transformer blocks",
            ends=True,
            temporal=True,
            attention=False,
            split=False,
            attends=False,
        ),
    )
}


def find_coverage(name: str) -> Coverage:
    """The profile of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in COVERAGES:
        raise UsageError(unknown("coverage", name, COVERAGES))
    return COVERAGES[name]


def covered(structure: Structure, coverage: Coverage, exclude: Iterable[str] = ()) -> list[Layer]:
    """The layers that a profile quantizes, in execution order; ``exclude`` holds shell globs of paths."""
    patterns = tuple(exclude)
    first_of_time = () if coverage.second else structure.time.layers[:1]
    return [
        layer
        for layer in structure.layers
        if (coverage.temporal or not layer.temporal)
        and (coverage.ends or not (layer.first or layer.last))
        and (coverage.shortcuts or not (layer.shortcut or layer.resamples))
        and (coverage.attends or not layer.attention)
        and layer.path not in first_of_time
        and not any(fnmatchcase(layer.path, pattern) for pattern in patterns)
    ]


def float_inputs(layers: list[Layer], coverage: Coverage) -> set[str]:
    """Paths of covered layers whose inputs stay in float."""
    if coverage.second:
        return set()
    seconds = (next((layer for layer in layers if layer.temporal is part), None) for part in (True, False))
    return {layer.path for layer in seconds if layer is not None}
