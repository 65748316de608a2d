"""A checkout of a reference repository made to run on a CPU, with the weights of a diffusers network.

The code itself is untouched. Around it: what it sends to CUDA stays on the CPU, packages that its scripts import
and its quantizers do not use are empty, and the network is its own class of DDIM's or LDM's U-Net with our weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from qdeploy.model.compvis_paths import diffusers_paths

Network = Callable[..., Tensor]
"""Of inputs [N, C, H, W], timesteps [N] and, if it is conditional, contexts [N, L, D], the prediction."""

Rows = tuple[Tensor, ...]
"""What a network is called with: inputs, timesteps and, if it is conditional, contexts."""


@dataclass(frozen=True)
class Quantized:
    """What the authors' code made.

    Attributes:
        network: the quantized network.
        saved: what its script saves of it.
    """

    network: Network
    saved: Mapping[str, Any]


# What the scripts import and the quantizers never call.
EMPTY = (
    "pytorch_lightning", "omegaconf", "omegaconf.listconfig", "linklink", "linklink.dist_helper", "torchvision",
    "torchvision.utils", "ldm.models.diffusion.ddpm", "ldm.models.diffusion.ddim", "ldm.models.diffusion.plms",
)  # fmt: skip


class _Empty(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_from(
    checkout: Path, *modules: str, beside: tuple[str, ...] = (), named: Mapping[str, str] | None = None
) -> list[ModuleType]:
    """Modules of a checkout; one checkout for each process, since they share names.

    Args:
        checkout: folder of the repository.
        modules: their dotted names.
        beside: folders of the checkout that have to be on the path, too.
        named: packages that the code imports under a name that is not their folder's, and their folders.
    """
    for folder in (checkout, *(checkout / name for name in beside)):
        sys.path.insert(0, str(folder))
    for name in EMPTY:
        try:
            importlib.import_module(name)
        except Exception:
            sys.modules[name] = _Empty(name)
    for name, folder in (named or {}).items():
        place = checkout / folder
        found = importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert found is not None
        assert found.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[name])
    return [importlib.import_module(name) for name in modules]


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """What asks for CUDA gets the CPU."""
    tensor_to, module_to = Tensor.to, nn.Module.to

    def here(value: Any) -> Any:
        cuda = isinstance(value, str | torch.device) and "cuda" in str(value)
        return torch.device("cpu") if cuda else value

    def redirected(to: Any) -> Any:
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            return to(self, *map(here, args), **{key: here(value) for key, value in kwargs.items()})

        return moved

    with (
        patch.object(Tensor, "to", redirected(tensor_to)),
        patch.object(nn.Module, "to", redirected(module_to)),
        patch.object(Tensor, "cuda", lambda self, *_, **__: self),
        patch.object(nn.Module, "cuda", lambda self, *_, **__: self),
        patch.object(torch.cuda, "empty_cache", lambda: None),
    ):
        yield


@contextmanager
def contiguous_convolutions() -> Iterator[None]:
    """Convolutions get contiguous inputs, where LDM's transformers hand on channels-last ones.

    OneDNN's gradients of those end the process on some processors.
    """
    convolve = nn.functional.conv2d
    with patch.object(
        nn.functional, "conv2d", lambda x, *args, **how: convolve(x.contiguous(), *args, **how)
    ):
        yield


def ddim_network(diffusion: ModuleType, ours: nn.Module) -> nn.Module:
    """The checkout's U-Net of DDIM with the weights of a diffusers ``UNet2DModel`` of that family.

    Args:
        diffusion: the checkout's module ``ddim.models.diffusion``.
        ours: the diffusers network.
    """
    config = ours.config
    sizes = [config.sample_size // 2**level for level in range(len(config.block_out_channels))]
    attends = [size for size, kind in zip(sizes, config.down_block_types, strict=True) if "Attn" in kind]
    asked = Namespace(
        model=Namespace(
            ch=config.block_out_channels[0], out_ch=config.out_channels, num_res_blocks=config.layers_per_block,
            ch_mult=[width // config.block_out_channels[0] for width in config.block_out_channels],
            attn_resolutions=attends, dropout=config.dropout, in_channels=config.in_channels,
            resamp_with_conv=True, type="simple",
        ),
        data=Namespace(image_size=config.sample_size, channels=config.in_channels),
        diffusion=Namespace(num_diffusion_timesteps=1000),
        split_shortcut=True,
    )  # fmt: skip

    def normalize(channels: int) -> nn.Module:
        return nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)

    with patch.object(diffusion, "Normalize", normalize):
        network: nn.Module = diffusion.Model(asked)
    state, own = {}, ours.state_dict()
    norms = {"norm": "group_norm", "norm_out": "conv_norm_out"}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        head, _, last = layer.rpartition(".")
        if last in norms:
            path = (
                norms[last] if not head else f"{_place(f'{head}.q', ours).rpartition('.')[0]}.{norms[last]}"
            )
        else:
            path = _place(layer, ours)
        state[name] = own[f"{path}.{kind}"].reshape(value.shape)
    network.load_state_dict(state)
    return network.float().eval()


def ldm_network(openaimodel: ModuleType, ours: nn.Module) -> nn.Module:
    """The checkout's U-Net of LDM with the weights of a diffusers ``UNet2DConditionModel`` of that family.

    Args:
        openaimodel: the checkout's module ``ldm.modules.diffusionmodules.openaimodel``.
        ours: the diffusers network, with a transformer block in each block that attends.
    """
    config = ours.config
    attends = [2**level for level, kind in enumerate(config.down_block_types) if "Attn" in kind]
    network: nn.Module = openaimodel.UNetModel(
        image_size=config.sample_size, in_channels=config.in_channels, out_channels=config.out_channels,
        model_channels=config.block_out_channels[0], num_res_blocks=config.layers_per_block,
        channel_mult=[width // config.block_out_channels[0] for width in config.block_out_channels],
        attention_resolutions=attends, num_heads=config.attention_head_dim, use_spatial_transformer=True,
        transformer_depth=1, context_dim=config.cross_attention_dim,
    )  # fmt: skip
    own, state = ours.state_dict(), network.state_dict()
    places = diffusers_paths({name.rpartition(".")[0] for name in state}, ours)
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        (place,) = places[layer]
        state[name] = own[f"{place.path}.{kind}"].reshape(value.shape)
    network.load_state_dict(state)
    return network.float().eval()


def _place(layer: str, ours: nn.Module) -> str:
    """Where a layer of DDIM's code is in the diffusers network."""
    names = ["down.0.block.0.conv1", layer]  # the first tells whose names they are
    if layer in ("conv_norm_out", "norm_out"):
        return "conv_norm_out"
    (place,) = diffusers_paths(names, ours)[layer]
    return place.path


class Untouched(nn.Module):
    """Hides a layer from the quantizers, which replace convolutions and linear layers that they find."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden = (layer,)
        self.split = 0

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """As the layer; how to split its channels does not matter."""
        return self.hidden[0](x)  # type: ignore[no-any-return]


def network_with(diffusion: ModuleType, ours: nn.Module, quantized: Collection[str] | None) -> nn.Module:
    """`ddim_network`, of which some layers are hidden.

    Args:
        diffusion: the checkout's module ``ddim.models.diffusion``.
        ours: the diffusers network.
        quantized: diffusers paths of the layers that the code gets to see; all, if None.
    """
    network = ddim_network(diffusion, ours)
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for name in layers:
        if quantized is not None and _place(name, ours) not in quantized:
            head, _, last = name.rpartition(".")
            setattr(network.get_submodule(head), last, Untouched(network.get_submodule(name)))
    return network


class Passing(nn.Module):
    """In the place of a quantizer: leaves values as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bits = 16
        self.level = 2**16
        self.running_stat = False
        self.delta = torch.zeros(
            (), requires_grad=True
        )  # for optimisers alone: no parameter, so it is not saved
        self.zero_point = None

    def forward(self, x: Tensor) -> Tensor:
        """The same values."""
        return x


def leave_attention(network: nn.Module, kind: type[nn.Module], word: str) -> None:
    """Leave q, k, v and the softmax output in float.

    Args:
        network: quantized by the authors' code.
        kind: its class of attentions.
        word: what the names of its quantizers begin with.
    """
    for module in network.modules():
        if isinstance(module, kind):
            for letter in "qkvw":
                setattr(module, f"{word}_{letter}", Passing())


def reconstruct(
    network: nn.Module, inside: nn.Module, learners: Mapping[type, Callable[..., object]], **how: object
) -> None:
    """Learn layer by layer and block by block, in the order of the scripts of Q-Diffusion and its successors.

    Args:
        network: the whole.
        inside: the part of it that is left to learn.
        learners: of the checkout, for its classes of quantized layers and blocks.
        how: further arguments of the learners.
    """
    for child in inside.children():
        learn = next((each for kind, each in learners.items() if isinstance(child, kind)), None)
        if learn is None:
            reconstruct(network, child, learners, **how)
        else:
            learn(network, child, **how)


@contextmanager
def silent() -> Iterator[None]:
    """What the code prints is dropped."""
    with patch("builtins.print", lambda *_, **__: None):
        yield
