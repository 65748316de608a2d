"""The names of CompVis' checkpoints in diffusers' networks, and the tensors where their layout differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qdeploy.model.compvis_paths import diffusers_paths
from qdeploy.model.importing.ldm_config import LatentDiffusionConfig

if TYPE_CHECKING:
    from torch import Tensor

_AUTOENCODER_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}


def unet_tensors(tensors: Mapping[str, Tensor], network: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``model.diffusion_model`` under their names in diffusers' network.

    What has no place there keeps its name, so that it is named as unknown when the network is filled.

    Args:
        tensors: by name, without the prefix.
        network: diffusers' network; its parameters need no memory.
    """
    places = diffusers_paths({name.rpartition(".")[0] for name in tensors}, network)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        found = places[module]
        rows = sum(len(place.rows) for place in found if place.rows is not None)
        if not found or (rows and rows != len(tensor)):
            yield name, tensor
            continue
        for place in found:
            part = tensor if place.rows is None else tensor[place.rows]
            expected = getattr(network.get_submodule(place.path), kind, None)
            yield f"{place.path}.{kind}", part if expected is None else _squeezed(part, expected.ndim)


def _squeezed(tensor: Tensor, axes: int) -> Tensor:
    """Without trailing axes of one element: the weight of a convolution of size 1 as that of a linear layer."""
    while tensor.ndim > axes and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    return tensor


def autoencoder_tensors(
    tensors: Mapping[str, Tensor], config: LatentDiffusionConfig
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``first_stage_model`` under their names in diffusers' autoencoder.

    Args:
        tensors: by name, without the prefix.
        config: of the model.
    """
    last = len(config.first_stage["ddconfig"]["ch_mult"]) - 1
    for name, tensor in tensors.items():
        if name.startswith(("loss.", "quantize.embed_", "model_ema.")):
            continue
        new = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        new = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.", new)
        new = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", new)
        new = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", new)
        new = re.sub(r"\.(downsample|upsample)\.conv\.", r".\1rs.0.conv.", new)
        new = new.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
        if found := re.fullmatch(r"(.*)\.(?:mid\.attn_1|attn\.(\d+))\.(\w+)\.(weight|bias)", new):
            place = "attentions" if found[2] else "mid_block.attentions"
            new = f"{found[1]}.{place}.{found[2] or 0}.{_AUTOENCODER_ATTENTION[found[3]]}.{found[4]}"
            tensor = _squeezed(tensor, 2)
        yield new, tensor
