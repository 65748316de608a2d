"""LoRA (Hu et al., ICLR 2022) fused into the weights of a pipeline: W + scale * alpha / r * B A.

Diffusers converts the names of the trainers' files (``lora_state_dict`` of the pipeline's class); fusing them needs
neither peft nor a network with adapters in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qdeploy.model.importing.checkpoint_file import read_checkpoint
from qdeploy.system.errors import InvalidInputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_V = TypeVar("_V")


@dataclass(frozen=True)
class Lora:
    """A LoRA to fuse.

    Attributes:
        file: its weights.
        scale: what they are multiplied with.
    """

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read ``FILE`` or ``FILE:SCALE``.

        Raises:
            UsageError: the scale is no finite number.
        """
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            scale = float(number)
        except ValueError:
            return cls(Path(text))  # a name with a colon in it, which does not exist
        if not abs(scale) < float("inf"):
            raise UsageError(f"--lora {text} has a scale that is no finite number")
        return cls(Path(name), scale)


def fuse_lora(pipeline: Any, lora: Lora) -> None:
    """Add a LoRA to the weights of a pipeline's networks.

    Args:
        pipeline: in float32, in memory.
        lora: its file and scale.

    Raises:
        InvalidInputError: the file is no LoRA, holds more than LoRA layers, or belongs to another model.
    """
    tensors, alphas, ranks = _converted(pipeline, lora.file)
    if not any(name.endswith(_DOWN) for name in tensors):
        raise InvalidInputError(
            f"{lora.file} is no LoRA: it holds {len(tensors)} tensors and no pair of factors"
        )
    changes = []
    for name in sorted(tensors):
        if name.endswith(_UP) and name.removesuffix(_UP) + _DOWN in tensors:
            continue
        if not name.endswith(_DOWN):
            raise InvalidInputError(
                f"{lora.file} holds {name}, which is no LoRA layer of weights and cannot be fused"
            )
        path = name.removesuffix(_DOWN)
        up, down = tensors.get(path + _UP), tensors[name]
        layer = _find(pipeline, path)
        if up is None or layer is None or not _fits(layer, up, down):
            raise InvalidInputError(
                f"{lora.file} belongs to another model: this {type(pipeline).__name__} has no layer {path} of its "
                "size"
            )
        changes.append((layer, up, down, lora.scale * _strength(path, down, alphas, ranks)))
    for layer, up, down, scale in changes:  # nothing is changed before all of it fits
        product = up.float().flatten(1) @ down.float().flatten(1)
        weight = layer.get_parameter("weight")
        weight.data = weight.data + scale * product.reshape(weight.shape)


def _converted(pipeline: Any, file: Path) -> tuple[dict[str, Tensor], Mapping[str, float], Mapping[str, Any]]:
    """Tensors by ``COMPONENT.PATH.lora_A.weight``, alphas by ``COMPONENT.PATH``, and peft's notes on ranks."""
    convert = getattr(pipeline, "lora_state_dict", None)
    if convert is None:
        raise InvalidInputError(f"a {type(pipeline).__name__} takes no LoRA in diffusers")
    read = read_checkpoint(file)
    options: dict[str, Any] = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(convert).parameters:
        options["return_alphas"] = True
    if getattr(pipeline, "unet", None) is not None:
        options["unet_config"] = pipeline.unet.config
    try:
        return _named(pipeline, convert(str(file) if file.suffix == ".safetensors" else read, **options))
    except Exception as error:  # diffusers raises whatever the first odd name causes
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(
            f"{file} is no LoRA for a {type(pipeline).__name__}: diffusers cannot convert it ({first})"
        ) from error


def _named(
    pipeline: Any, found: tuple[Any, ...]
) -> tuple[dict[str, Tensor], Mapping[str, float], Mapping[str, Any]]:
    tensors, notes = found[0], found[-1] or {}
    alphas = (found[1] if len(found) == 3 else None) or {}
    named: dict[str, float] = {}
    for name, alpha in alphas.items():
        layer = name.removesuffix(".alpha")
        ways = (
            layer,
            *(layer + way for way in (".lora.down.weight", ".lora_linear_layer.down.weight", _DOWN)),
        )
        named |= {next((way for way in ways if way in tensors), layer): alpha}
    renamed = {name.removesuffix(_DOWN): alpha for name, alpha in _as_peft(pipeline, named).items()}
    return _as_peft(pipeline, tensors), renamed, notes


def _as_peft(pipeline: Any, values: Mapping[str, _V]) -> dict[str, _V]:
    """The same values under peft's names of layers."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    converted: dict[str, _V] = {}
    left = dict(values)
    for component in pipeline.components:
        start = f"{component}."
        own = {name.removeprefix(start): left.pop(name) for name in list(left) if name.startswith(start)}
        if own and not any(".lora_A." in name for name in own):
            if component.startswith("text_encoder"):
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            else:
                own = convert_unet_state_dict_to_peft(own)
        converted |= {start + name: value for name, value in own.items()}
    return converted | left


def _find(pipeline: Any, path: str) -> nn.Module | None:
    component, _, layer = path.partition(".")
    network: Any = getattr(pipeline, component, None)
    # transformers' text encoders have lost a level of names, which trainers' files still have
    for name in (layer, layer.removeprefix("text_model.")):
        try:
            found: nn.Module = network.get_submodule(name)
        except AttributeError:
            continue
        return found
    return None


def _fits(layer: nn.Module, up: Tensor, down: Tensor) -> bool:
    weight = getattr(layer, "weight", None)
    if weight is None or up.ndim != down.ndim or weight.ndim < 2:
        return False
    pair: bool = up[0].numel() == down.shape[0]
    return pair and bool(weight.shape[0] == up.shape[0] and weight[0].numel() == down[0].numel())


def _strength(path: str, down: Tensor, alphas: Mapping[str, float], notes: Mapping[str, Any]) -> float:
    """alpha / r; 1 where a file says nothing of alpha, as diffusers takes it."""
    component, _, layer = path.partition(".")
    rank = down.shape[0]
    if path in alphas:
        return float(alphas[path]) / rank
    patterns = {
        name.removeprefix(f"{component}."): value
        for name, value in notes.items()
        if name.startswith(f"{component}.")
    }
    own = patterns.get("alpha_pattern") or {}
    alpha = next((value for name, value in own.items() if layer.endswith(str(name).lstrip("^"))), None)
    alpha = patterns.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if patterns.get("use_rslora") else rank)
