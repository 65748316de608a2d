"""Tiny networks, one of every family of denoisers, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]

CLASSES = 10
WIDTH = 16


def tiny_unet(channels: Sequence[int] = (8, 16), layers: int = 1, seed: int = 0, size: int = 8) -> nn.Module:
    """An unconditional U-Net with attention, concatenating shortcuts, tied q, k, v, and dropout."""
    from diffusers import UNet2DModel

    plain = len(channels) - 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = UNet2DModel(
            sample_size=size,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            norm_num_groups=4,
            attention_head_dim=4,
            dropout=0.1,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        )
    return network.eval().requires_grad_(False)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet() -> Made:
    """An unconditional U-Net."""
    return tiny_unet(), {"sample": _noise(1, 3, 8, 8), "timestep": torch.tensor([500])}


def class_unet() -> Made:
    """A U-Net whose class labels are added to the time embedding."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=CLASSES,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    labels = torch.tensor([3])
    return network, {"sample": _noise(1, 3, 8, 8), "timestep": torch.tensor([500]), "class_labels": labels}


def text_unet() -> Made:
    """Stable Diffusion's U-Net: prompts enter by cross-attention."""
    return condition_unet(), {**_latents(), "encoder_hidden_states": _noise(1, 5, WIDTH, seed=1)}


def sdxl_unet() -> Made:
    """SDXL's U-Net: the pooled prompt and the sizes are added to the time embedding."""
    pooled = 8
    network = condition_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
    )
    return network, {
        **_latents(),
        "encoder_hidden_states": _noise(1, 5, WIDTH, seed=1),
        "added_cond_kwargs.text_embeds": _noise(1, pooled, seed=2),
        "added_cond_kwargs.time_ids": torch.full((1, 6), 8.0),
    }


def dit() -> Made:
    """DiT: every block embeds the timestep anew and adds the embedding of the class."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        norm_num_groups=4,
        num_embeds_ada_norm=CLASSES,
    )
    hidden = {"hidden_states": _noise(1, 4, 8, 8)}
    return network, {**hidden, "timestep": torch.tensor([500]), "class_labels": torch.tensor([3])}


def pixart() -> Made:
    """PixArt: one embedding of the timestep for all blocks (AdaLayerNormSingle)."""
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    hidden = {"hidden_states": _noise(1, 4, 8, 8), "encoder_hidden_states": _noise(1, 5, WIDTH, seed=1)}
    return network, {**hidden, "timestep": torch.tensor([500])}


def _latents() -> dict[str, Tensor]:
    return {"sample": _noise(1, 4, 8, 8), "timestep": torch.tensor([500])}


def condition_unet(channels: Sequence[int] = (8, 16), **changes: object) -> nn.Module:
    """Stable Diffusion's U-Net for prompts of `WIDTH` features; attention at the lowest resolution."""
    from diffusers import UNet2DConditionModel

    plain = len(channels) - 1
    small: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": tuple(channels),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
    }
    network: nn.Module = UNet2DConditionModel(**{**small, **changes})
    return network


FAMILIES: dict[str, Callable[[], Made]] = {
    family.__name__: family for family in (unet, class_unet, text_unet, sdxl_unet, dit, pixart)
}


def make(family: str, seed: int = 0) -> Made:
    """A family's network with random weights, in evaluation mode, and one row of its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, inputs = FAMILIES[family]()
    return network.eval().requires_grad_(False), inputs


def make_two_rows(family: str) -> Made:
    """As `make`, with two rows of other samples, conditions and timesteps."""
    network, inputs = make(family)
    rows = {name: torch.cat([x, x.flip(-1)]) for name, x in inputs.items() if name != "timestep"}
    return network, {**rows, "timestep": torch.tensor([7, 900])}


def tiny_dit() -> nn.Module:
    """A class-conditional transformer whose linear layers are 128 and 512 wide, so that int4 blocks fit."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = DiTTransformer2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            patch_size=2,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=32,
            norm_num_groups=4,
            num_embeds_ada_norm=CLASSES,
        )
    return network.eval().requires_grad_(False)
