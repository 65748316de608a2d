"""Checkpoints of latent diffusion (Rombach et al., CVPR 2022) as diffusers pipelines.

Unconditional models become an `LDMPipeline`, class-conditional ones a `DiTPipeline`, whose loop is the one that
they are sampled with: labels in, guidance against class 1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.model.fill import fill_tensors, without_parameters
from qdeploy.model.importing.checkpoint_file import read_checkpoint
from qdeploy.model.importing.ldm_config import LatentDiffusionConfig, read_config
from qdeploy.model.importing.ldm_names import autoencoder_tensors, unet_tensors
from qdeploy.model.networks import find_network_class
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from torch import Tensor

_UNET, _STAGE, _AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema."
_CLASSES = "cond_stage_model.embedding.weight"


def latent_diffusion_pipeline(file: Path, yaml: Path) -> Any:
    """The diffusers pipeline of a checkpoint and its YAML.

    Where the checkpoint holds a moving average of the denoiser's weights, these are taken, as by the original's
    scripts.

    Args:
        file: the checkpoint.
        yaml: its configuration, as CompVis publishes it.

    Raises:
        InvalidInputError: one of them cannot be read, the architecture is another one, or the weights do not fit it.
    """
    import diffusers

    config = read_config(yaml)
    tensors = read_checkpoint(file)
    if not any(name.startswith(_UNET) for name in tensors):
        raise InvalidInputError(
            f"{file} is no checkpoint of latent diffusion: no tensor's name begins with {_UNET}"
        )
    denoiser = _denoiser(file, config, tensors)
    autoencoder = _autoencoder(file, config, tensors)
    scheduler = diffusers.DDIMScheduler(**config.scheduler_config())
    if config.classes is not None:
        return diffusers.DiTPipeline(transformer=denoiser, vae=autoencoder, scheduler=scheduler)
    return diffusers.LDMPipeline(vqvae=autoencoder, unet=denoiser, scheduler=scheduler)


def _denoiser(file: Path, config: LatentDiffusionConfig, tensors: Mapping[str, Tensor]) -> Any:
    kind, described = config.unet_config()
    found = {name.removeprefix(_UNET): tensor for name, tensor in tensors.items() if name.startswith(_UNET)}
    if config.params.get("use_ema", True) and any(name.startswith(_AVERAGED) for name in tensors):
        say(f"the moving average of the weights in {file.name} is taken")
        # The original drops the dots from these names.
        averaged = {name: f"{_AVERAGED}diffusion_model{name.replace('.', '')}" for name in found}
        if missing := [other for other in averaged.values() if other not in tensors]:
            raise InvalidInputError(f"{file} lacks {missing[0]} of the moving average of its weights")
        found = {name: tensors[other] for name, other in averaged.items()}
    network = _hollow(find_network_class(kind), described, config)
    converted = dict(unet_tensors(found, network))
    if config.classes is not None:
        if _CLASSES not in tensors:
            raise InvalidInputError(f"{file} lacks the table of classes, {_CLASSES}")
        converted["label_embedding.weight"] = tensors[_CLASSES]
    fill_tensors(network, converted.items(), file, str(config.path))
    return network


def _autoencoder(file: Path, config: LatentDiffusionConfig, tensors: Mapping[str, Tensor]) -> Any:
    kind, described = config.autoencoder_config()
    scale: Any = config.params.get("scale_factor", 1.0)
    if config.params.get("scale_by_std"):
        if "scale_factor" not in tensors:
            raise InvalidInputError(f"{file} lacks the scale of its latents, scale_factor")
        scale = tensors["scale_factor"]
    found = {name.removeprefix(_STAGE): tensor for name, tensor in tensors.items() if name.startswith(_STAGE)}
    import diffusers

    network = _hollow(getattr(diffusers, kind), {**described, "scaling_factor": float(scale)}, config)
    fill_tensors(network, autoencoder_tensors(found, config), file, str(config.path))
    return network


def _hollow(kind: Any, described: Mapping[str, Any], config: LatentDiffusionConfig) -> Any:
    try:
        with without_parameters():
            return kind(**described).eval().float()
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise InvalidInputError(f"{config.path} describes no {kind.__name__}: {error}") from error
