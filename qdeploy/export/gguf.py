"""The verb ``export-gguf``: the weights of a checkpoint in a file that diffusers, among others, loads.

GGUF stores weights in blocks of 32 input features with a half-precision scale (ggml's ``Q4_0``, ``Q4_1``, ``Q8_0``).
The integers that a calibration has found go there as they are, so that learned roundings are kept. What is stored
are weights: scales of activations have no place in the format, and readers compute in floats.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.quant.checkpoint import checkpoint_model, load_checkpoint
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.operators import over_weight
from qdeploy.quant.quantizers import WeightQuantizer
from qdeploy.store.artifact import Artifact, Checkpoint, open_artifact
from qdeploy.store.files import explained_os_errors
from qdeploy.store.hub import local_artifact
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCK = 32
ARCHITECTURE = "diffusers"  # names of tensors are those of diffusers
_HALF = torch.finfo(torch.float16)
# What a layer may do to its input, or beside its product, by the attribute that is set then.
_CHANGES = {
    "table": "a table of the timestep",
    "smoothing": "smoothed inputs",
    "rotation": "rotated inputs",
    "branch_down": "a low-rank branch",
    "shift": "shifted inputs",
    "order": "reordered inputs",
}


@dataclass(frozen=True)
class GgufFile:
    """A file that was written.

    Attributes:
        path: the file.
        tensors: how many tensors each of ggml's types has.
        size_mb: in MiB.
        left: layers whose integers the format cannot hold; their weights are floats.
    """

    path: Path
    tensors: dict[str, int]
    size_mb: float
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy export-gguf --json``."""
        return {
            "path": str(self.path),
            "tensors": self.tensors,
            "size_mb": round(self.size_mb, 3),
            "left": list(self.left),
        }

    def as_text(self) -> str:
        """One line for people, and one for the layers that are stored as floats."""
        types = ", ".join(f"{count} {name}" for name, count in self.tensors.items())
        lines = [f"{self.path}: {self.size_mb:.1f} MB, tensors: {types}"]
        if self.left:
            lines += [f"stored as floats: {len(self.left)} layers, {self.left[0]} the first"]
        return "\n".join(lines)


def export_gguf(
    checkpoint: str | Path | Artifact, output: str | Path, *, overwrite: bool = False
) -> GgufFile:
    """Write a checkpoint's denoiser as a GGUF file, with diffusers' names.

    diffusers loads it with ``from_single_file(FILE, config=FOLDER, quantization_config=GGUFQuantizationConfig(...))``
    of the classes that have that method.

    Linear layers keep their integers where their weights have 8 bits or less and a scale is constant in each block
    of 32 input features (``int4b32``, ``int8b32``, and all formats with a scale for each channel): 4-bit codes as
    ``Q4_0``, with a zero point as ``Q4_1``, wider ones as ``Q8_0``. All other weights are stored as half-precision
    floats, vectors in float32.

    Args:
        checkpoint: what `calibrate` made.
        output: the file, named ``*.gguf``.
        overwrite: replace a file that is there.

    Returns:
        The file and what is in it.

    Raises:
        UsageError: the name does not end in ``.gguf``, or the file is there already.
        CapabilityError: the package gguf is not installed.
        InvalidInputError: it is no checkpoint; it has a layer whose input is changed, which a file of weights cannot
            say (smoothing, rotations, low-rank branches, tables of the timestep).

    Source: the ggml project's ``docs/gguf.md`` (the container) and ``ggml-common.h`` (the blocks).
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise CapabilityError("export-gguf needs the package gguf: pip install 'qdeploy[gguf]'") from error
    path = Path(output)
    if path.suffix != ".gguf":
        raise UsageError(f"the file is named *.gguf, not {path.name}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already: pass --overwrite to replace it")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_artifact(local_artifact(checkpoint), Checkpoint)
    denoiser = load_checkpoint(checkpoint)
    layers = quantized_layers(denoiser)
    for name, layer in layers.items():
        if (changed := _changed_input(layer)) is not None:
            raise InvalidInputError(
                f"{checkpoint.path}: the layer {name} has {changed}, which a GGUF file cannot hold: calibrate with a "
                "recipe without it"
            )
    if any(layer.activation_quantizers for layer in layers.values()):
        say("scales of activations have no place in GGUF: readers compute with these weights in floats")
    names = list(checkpoint_model(checkpoint).build().state_dict())
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer = GGUFWriter(draft, ARCHITECTURE)
            writer.add_name(f"{checkpoint.facts.class_name} {checkpoint.facts.precision}")
            writer.add_string("qdeploy.checkpoint", checkpoint.sha256)
            types, left = _add_tensors(writer, denoiser, layers, names)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return GgufFile(path, dict(sorted(types.items())), path.stat().st_size / 2**20, tuple(left))


def _changed_input(layer: QuantizedLayer) -> str | None:
    """What a layer does beside multiplying its input by its weight; None if nothing."""
    return next((words for name, words in _CHANGES.items() if getattr(layer, name) is not None), None)


def _add_tensors(
    writer: GGUFWriter, denoiser: nn.Module, layers: dict[str, QuantizedLayer], names: list[str]
) -> tuple[Counter[str], list[str]]:
    """Add every tensor of a network by its name in diffusers; counts by type, and layers that became floats."""
    from gguf import GGMLQuantizationType

    types: Counter[str] = Counter()
    left: list[str] = []
    state = denoiser.state_dict()
    for name in names:
        path, _, kind = name.rpartition(".")
        layer = layers.get(path)
        if layer is None:
            tensor = state[name]
        elif kind == "bias":
            assert layer.bias is not None
            tensor = layer.bias
        else:
            if (stored := blocks_of(layer)) is not None:
                kind_of_block, data = stored
                writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind_of_block])
                types[kind_of_block] += 1
                continue
            left.append(path)
            tensor = torch.cat(layer.quantized_weights(), 1)
        array = _floats(tensor)
        writer.add_tensor(name, array)
        types["F16" if array.dtype == np.float16 else "F32"] += 1
    return types, left


def _floats(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Vectors, and what half precision cannot hold, in float32; the rest in half precision."""
    values = tensor.detach().float().contiguous()
    if values.ndim < 2 or values.abs().max() > _HALF.max:
        return values.numpy()
    return values.half().numpy()


def blocks_of(layer: QuantizedLayer) -> tuple[str, np.ndarray[Any, Any]] | None:
    """The integers of a linear layer in ggml's blocks.

    Returns:
        The name of ggml's type and [O, bytes] of a row's blocks; None where the format cannot hold the layer: a
        convolution, floats, features that are not whole blocks, a scale that changes within one.
    """
    if not isinstance(layer.inner, nn.Linear) or not layer.weight_quantizers:
        return None
    parts = cast("list[WeightQuantizer]", list(layer.weight_quantizers))
    number_format = parts[0].format
    if number_format.floating or number_format.bits > 8 or any(part.codes is None for part in parts):
        return None
    codes, scale, zero = (torch.cat(each, 1) for each in zip(*map(_by_weight, parts), strict=True))
    if codes.shape[1] % BLOCK:
        return None
    codes, scale, zero = (each.unflatten(1, (-1, BLOCK)) for each in (codes, scale, zero))
    if not all((each == each[..., :1]).all() for each in (scale, zero)):
        return None
    return pack(codes, scale[..., 0], zero[..., 0], number_format.bits)


def _by_weight(quantizer: WeightQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Code, scale and code of zero of every weight, [O, I] each."""
    assert quantizer.codes is not None
    codes = quantizer.codes.int()
    scale, zero = (over_weight(each, codes.shape) for each in (quantizer.scale, quantizer.zero_point))
    return codes, scale.expand(codes.shape), zero.expand(codes.shape)


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[str, np.ndarray[Any, Any]] | None:
    """Blocks of integers as ggml stores them.

    Args:
        codes: [O, B, 32] integers q; what they stand for is ``(q - zero) * scale``.
        scale: [O, B] steps.
        zero: [O, B] codes of zero.
        bits: width of the codes.

    Returns:
        ``Q4_0`` (codes from -8 to 7), ``Q4_1`` (codes from 0 to 15 and the value of code 0) or ``Q8_0``, and
        [O, B * bytes of a block]; None where a scale is above or below what half precision holds.
    """
    symmetric = not bool(zero.any())
    least = -scale * zero
    if (scale > _HALF.max).any() or (scale < _HALF.smallest_normal).any() or (least.abs() > _HALF.max).any():
        return None
    if bits <= 4:
        stored = codes + 8 if symmetric else codes
        if symmetric and (stored.min() < 0 or stored.max() > 15):
            return None
        nibbles = stored.to(torch.uint8)
        halves = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
        head = [_bytes(scale)] if symmetric else [_bytes(scale), _bytes(least)]
        packed = torch.cat([*head, halves], -1)
        return ("Q4_0" if symmetric else "Q4_1"), packed.flatten(1).numpy()
    centred = codes - zero.unsqueeze(-1)
    if centred.min() < -128 or centred.max() > 127:
        return None
    packed = torch.cat([_bytes(scale), centred.to(torch.int8).view(torch.uint8)], -1)
    return "Q8_0", packed.flatten(1).numpy()


def _bytes(values: Tensor) -> Tensor:
    """[O, B] numbers as [O, B, 2] bytes of half precision."""
    return values.half().unsqueeze(-1).contiguous().view(torch.uint8)
