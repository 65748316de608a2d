"""Put the weights of files into a network, tensor by tensor, in float32."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.model.weights import read_tensors
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Names of attention's layers in files of before 2023, which diffusers renames too.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(?P<path>.*)\.(?P<layer>{'|'.join(_RENAMED)})\.(?P<what>weight|bias)")
_LORA = re.compile(r"(^|\.)(lora_\w+|base_layer)(\.|$)")


@contextmanager
def without_parameters() -> Iterator[None]:
    """Within, modules are made whose parameters have a shape alone; buffers have their values."""
    from torch import nn

    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(denoiser: nn.Module, files: Sequence[Path], folder: Path) -> None:
    """Load the weights in files into a network, converted to float32.

    A tensor is read, converted and put in its place before the next one is read, so that a network in another type
    takes no second copy of itself. What is stored in float32 stays mapped into memory.

    Args:
        denoiser: the network; its parameters need no memory.
        files: its safetensors files.
        folder: of the network, for messages.

    Raises:
        InvalidInputError: a file is truncated, the tensors are not those of the network, or hold NaN or Inf.
    """
    fill_tensors(denoiser, read_tensors(files), folder)


def fill_tensors(
    denoiser: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    config: str = "its config.json",
    left: Collection[str] = (),
) -> None:
    """As `fill`, with tensors that are read already.

    Args:
        denoiser: the network; its parameters need no memory.
        tensors: names and tensors.
        folder: where they are from, for messages.
        config: where the network's configuration is from, for messages.
        left: names in the network of tensors that are looked at and not put into it.

    Raises:
        InvalidInputError: the tensors are not those of the network, or hold NaN or Inf.
    """
    import torch

    expected = denoiser.state_dict()
    ignored = getattr(denoiser, "_keys_to_ignore_on_load_unexpected", None) or []
    missing, foreign = set(expected), set()
    for stored, tensor in tensors:
        name = current_name(stored, expected)
        if name not in expected:
            if not any(re.search(pattern, name) for pattern in ignored):
                foreign.add(name)
            continue
        if tensor.shape != expected[name].shape:
            raise InvalidInputError(
                f"the weights in {folder} do not fit {config}: {name} has shape {list(tensor.shape)} instead "
                f"of {list(expected[name].shape)}"
            )
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidInputError(f"the weights in {folder} hold NaN or Inf, first in {name}")
        if name not in left:
            _assign(denoiser, name, tensor)
        missing.discard(name)
    if missing or foreign:
        raise InvalidInputError(_mismatch(denoiser, folder, missing, foreign))


def _assign(denoiser: nn.Module, name: str, tensor: Tensor) -> None:
    from torch import nn

    path, _, leaf = name.rpartition(".")
    module = denoiser.get_submodule(path)
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def current_name(name: str, expected: Collection[str]) -> str:
    """The name that a tensor has in the network, where its file uses a name from before 2023."""
    old = None if name in expected else _OLD.fullmatch(name)
    renamed = f"{old['path']}.{_RENAMED[old['layer']]}.{old['what']}" if old else name
    return renamed if renamed in expected else name


def _mismatch(denoiser: nn.Module, folder: Path, missing: set[str], foreign: set[str]) -> str:
    if any(_LORA.search(name) for name in foreign):
        return (
            f"the weights in {folder} hold LoRA layers that are not fused into the network: call fuse_lora() and "
            "unload_lora_weights() on the pipeline before it is saved, or fuse "
            "the LoRA's own file with `qdeploy import MODEL --lora FILE -o FOLDER`"
        )
    if any(name.endswith((".absmax", ".quant_state", ".SCB", ".weight_scale")) for name in foreign):
        return f"the weights in {folder} are quantized already: qdeploy starts from full precision"
    example = sorted(missing or foreign)[0]
    return (
        f"the weights in {folder} do not belong to a {type(denoiser).__name__}: {len(missing)} tensors are missing "
        f"and {len(foreign)} unknown, such as {example}"
    )
