"""What a network costs: bytes on disk and bit-operations, layer by layer and format by format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from qdeploy.network.roles import Structure
from qdeploy.quant.checkpoint import float_parameters
from qdeploy.quant.layer import quantized_layers
from qdeploy.quant.packing import packed_bytes
from qdeploy.quant.state import read_state
from qdeploy.recipe.formats import Format

FLOAT_BITS = 32


@dataclass(frozen=True)
class Costs:
    """Costs of a network whose covered layers can have several formats.

    Attributes:
        fixed_bytes: what is in no code of a covered layer: scales, biases, layers that stay in float.
        fixed_macs: multiply-accumulates per sample that stay in float, attention products included.
        parts: codes in each part of a layer's weight, by path.
        macs: multiply-accumulates per sample of each covered layer, by path.
        float_bytes: the whole network in 32-bit floats.
    """

    fixed_bytes: int
    fixed_macs: int
    parts: Mapping[str, tuple[int, ...]]
    macs: Mapping[str, int]
    float_bytes: int

    def bytes(self, path: str, weights: Format) -> int:
        """Bytes of a layer's codes."""
        return sum(packed_bytes(count, weights) for count in self.parts[path])

    def bit_operations(self, path: str, weights: Format, activations: Format | None) -> int:
        """MACs times the bits of both operands; float activations count with 32, as their product does."""
        if activations is None:
            return self.macs[path] * FLOAT_BITS * FLOAT_BITS
        return self.macs[path] * weights.bits * activations.bits

    @property
    def fixed_bit_operations(self) -> int:
        """Bit-operations of what stays in float."""
        return self.fixed_macs * FLOAT_BITS**2

    @property
    def float_bit_operations(self) -> int:
        """Bit-operations of the whole network in 32-bit floats."""
        return (self.fixed_macs + sum(self.macs.values())) * FLOAT_BITS**2


def costs_of(denoiser: nn.Module, structure: Structure) -> Costs:
    """The costs of a network that has its quantizers, as `qdeploy.quant.checkpoint` will store it.

    Methods that add to a layer (factors, tables of features) add to its bytes too; they are not foreseen.
    """
    layers = quantized_layers(denoiser)
    parts = {path: tuple(map(prod, layer.part_shapes())) for path, layer in layers.items()}
    scales = sum(
        tensor.nbytes for name, tensor in read_state(denoiser).items() if not name.endswith(".codes")
    )
    plain = sum(tensor.nbytes for tensor in float_parameters(denoiser).values())
    macs = {layer.path: layer.macs for layer in structure.layers}
    left = sum(count for path, count in macs.items() if path not in layers)
    return Costs(
        scales + plain,
        left + sum(structure.products.values()),
        parts,
        {path: macs[path] for path in layers},
        plain + 4 * sum(map(sum, parts.values())),
    )


def stored_bytes(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint's component folder, without the headers of their files."""
    total = 0
    for name in ("quantized", "parameters"):
        with (folder / f"{name}.safetensors").open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        total += max(ends, default=0)
    return total
