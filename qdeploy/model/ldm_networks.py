"""Denoisers of latent diffusion (Rombach et al., CVPR 2022) that no class of diffusers computes.

Each is a diffusers network with one difference, and has that network's configuration with one more word. They are
addressed by this module's name in ``model_index.json``, so that diffusers opens their folders where qdeploy is
installed.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    ModelMixin as ModelMixin,  # diffusers looks up here how components of this module are loaded
)
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class HeadsUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with one number of attention heads at all widths, as LDM-8 on LSUN churches has.

    Args:
        num_attention_heads: number of heads; the parent class fixes the channels per head instead.
        unet: of `UNet2DModel`.
    """

    ignore_for_config = ["unet"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_attention_heads: int, **unet: Any) -> None:
        super().__init__(**unet)
        network: Any = self
        for module in network.modules():
            if isinstance(module, Attention):
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
                module.heads = num_attention_heads

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        return {*UNet2DModel._get_init_keys(UNet2DModel), "num_attention_heads"}


class ClassUNet2DModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` that attends to the embedding of a class, as ``cin256-v2`` does.

    It is called as `DiTPipeline` calls its transformer.

    Args:
        num_classes: rows of the table of classes, the null class included.
        unet: of `UNet2DConditionModel`.
    """

    ignore_for_config = ["unet"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int, **unet: Any) -> None:
        super().__init__(**unet)
        self.label_embedding = nn.Embedding(num_classes, unet["cross_attention_dim"])

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        return {*UNet2DConditionModel._get_init_keys(UNet2DConditionModel), "num_classes"}

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Any:
        """Predict.

        Args:
            sample: noisy latents, batch x channels x height x width.
            timestep: one for all rows, or one for each.
            class_labels: batch.
            return_dict: as in all of diffusers' networks.
        """
        context = self.label_embedding(class_labels)[:, None]
        parent: Any = super()
        return parent.forward(sample, timestep, context, return_dict=return_dict)
