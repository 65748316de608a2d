"""Engines in the place of a pipeline's autoencoder: ``pipe.vae = EngineAutoencoder(...)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from qdeploy.engines.component import EngineComponent
from qdeploy.engines.drop_in.model_stand_in import ModelStandIn
from qdeploy.system.errors import CapabilityError


@dataclass
class LatentsOutput(BaseOutput):
    """What autoencoders without a distribution return: ``latents``, and ``latent`` by other classes' name."""

    latents: Tensor
    latent: Tensor


class EngineAutoencoder(ModelStandIn):
    """A drop-in for the autoencoder that two engines were made from.

    Args:
        config: of the original model.
        path: the engine's folder, for messages.
        decoder: from ``latent_sample`` to ``sample``.
        encoder: from ``sample`` to ``latent_parameters`` (mean and log variance) or ``latent_sample``; None where
            there is none.
    """

    def __init__(
        self, config: Mapping[str, Any], path: Path, decoder: EngineComponent, encoder: EngineComponent | None
    ) -> None:
        # The engine's own precision is what it computes in, whatever dtype the pipeline has.
        super().__init__({**config, **({"force_upcast": False} if "force_upcast" in config else {})}, path)
        self._decoder, self._encoder = decoder, encoder

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Any = None, **ignored: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Images ``[B, C, H, W]`` of latents, in their dtype.

        Raises:
            InvalidInputError: latents of another number of channels.
        """
        sample = self._decoder({"latent_sample": z})["sample"].to(z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """What the original's ``encode`` returns: a distribution of latents, or latents.

        Raises:
            CapabilityError: the pipeline was exported without its encoder.
            InvalidInputError: images of another number of channels.
        """
        if self._encoder is None:
            raise CapabilityError(f"{self._path} holds no encoder of images: export the pipeline again")
        ((name, result),) = self._encoder({"sample": x}).items()
        result = result.to(x.dtype)
        if name == "latent_parameters":
            distribution = DiagonalGaussianDistribution(result)
            return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)
        return LatentsOutput(latents=result, latent=result) if return_dict else (result,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """An image encoded, and its mean or latents decoded."""
        (encoded,) = self.encode(sample, return_dict=False)
        latents = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.decode(latents, return_dict)
