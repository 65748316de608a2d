"""Pipelines that other tests use too, and those of other classes with their components."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.models import field, pipelines, transformers
from tests.models.catalogue.entry import loaded, tiny, variant, without_zeros
from tests.models.catalogue.stable_diffusion import FRAMES, controlnet

SMALL = {"height": 8, "width": 8, "guidance": 3.0}
MIDDLE = {"height": 16, "width": 16, "guidance": 3.0}


def _known(
    name: str, write: Callable[[Path], Path], prompts: Any = ("a cat", "two dogs"), **options: Any
) -> None:
    tiny(name, prompts, **options)(partial(loaded, write))


def _variant(
    name: str, write: Callable[[Path], Path], inputs: dict[str, Any] | None = None, **options: Any
) -> None:
    tiny(name, inputs=inputs, **options)(partial(variant, name, write))


_known("DDPMPipeline", pipelines.ddpm_folder, None)
_known("DiTPipeline", pipelines.dit_folder, ("1", "2"), guidance=3.0)
_known("PixArtAlphaPipeline", transformers.pixart_folder, guidance=3.0)
_known("StableDiffusion3Pipeline", transformers.sd3_folder, guidance=3.0)
_known("FluxPipeline", transformers.flux_folder, **MIDDLE)
_known("StableDiffusionXLPipeline", transformers.sdxl_folder, **SMALL)
_known("CogVideoXPipeline", field.cogvideox_folder, **MIDDLE)
_known("LTXPipeline", field.ltx_folder, height=32, width=32, guidance=3.0, arguments={"num_frames": 9})
_known("WanPipeline", field.wan_folder, **MIDDLE, arguments={"num_frames": 5})
_known(
    "WanPipeline with two experts",
    partial(field.wan_folder, experts=True),
    **MIDDLE,
    arguments={"num_frames": 5},
)
_known("LatentConsistencyModelPipeline", field.lcm_folder, guidance=8.0)
_known("ConsistencyModelPipeline", field.consistency_folder, ("1", "2"))
_known("KandinskyV22PriorPipeline", field.prior_folder, guidance=3.0)
_known("TextToVideoSDPipeline", field.video_folder, guidance=3.0, arguments=FRAMES)

_variant("StableDiffusionXLImg2ImgPipeline", transformers.sdxl_folder, {"image": 8}, guidance=3.0)
_variant("StableDiffusionXLInpaintPipeline", transformers.sdxl_folder, {"image": 8, "mask_image": 8}, **SMALL)
_variant("StableDiffusionXLPAGPipeline", transformers.sdxl_folder, **SMALL, arguments={"pag_scale": 2.0})
_variant("StableDiffusion3Img2ImgPipeline", transformers.sd3_folder, {"image": 8}, **SMALL)
_variant("StableDiffusion3InpaintPipeline", transformers.sd3_folder, {"image": 8, "mask_image": 8}, **SMALL)
_variant("StableDiffusion3PAGPipeline", transformers.sd3_folder, guidance=3.0, arguments={"pag_scale": 2.0})
_variant("FluxImg2ImgPipeline", transformers.flux_folder, {"image": 16}, **MIDDLE)
_variant("FluxInpaintPipeline", transformers.flux_folder, {"image": 16, "mask_image": 16}, **MIDDLE)
_variant(
    "FluxKontextPipeline",
    transformers.flux_folder,
    {"image": 16},
    **MIDDLE,
    arguments={"_auto_resize": False, "max_area": 256},
)
_variant("PixArtSigmaPipeline", transformers.pixart_folder, guidance=3.0)
_variant(
    "CogVideoXVideoToVideoPipeline", field.cogvideox_folder, {"video": ("video", 9, 16)}, batch=1, **MIDDLE
)
_variant("VideoToVideoSDPipeline", field.video_folder, {"video": ("video", 2, 8)}, batch=1, guidance=3.0)
_variant("WanVideoToVideoPipeline", field.wan_folder, {"video": ("video", 5, 16)}, batch=1, **MIDDLE)
_variant(
    "LTXConditionPipeline", field.ltx_folder, height=32, width=32, guidance=3.0, arguments={"num_frames": 9}
)


@tiny("PixArtSigmaPAGPipeline", guidance=3.0, arguments={"pag_scale": 2.0})
def sigma_with_pag() -> Any:
    return variant("PixArtSigmaPAGPipeline", transformers.pixart_folder, pag_applied_layers=["blocks.1"])


def _sdxl_hinted(name: str, inputs: dict[str, Any], **options: Any) -> None:
    @tiny(name, inputs=inputs, **SMALL, **options)
    def make() -> Any:
        network = loaded(transformers.sdxl_folder).unet
        return variant(name, transformers.sdxl_folder, unet=network, controlnet=controlnet(network))


_sdxl_hinted("StableDiffusionXLControlNetPipeline", {"image": 8})
_sdxl_hinted("StableDiffusionXLControlNetImg2ImgPipeline", {"image": 8, "control_image": 8})
_sdxl_hinted("StableDiffusionXLControlNetInpaintPipeline", {"image": 8, "mask_image": 8, "control_image": 8})


@tiny("StableDiffusion3ControlNetPipeline", inputs={"control_image": 8}, **SMALL)
def sd3_with_controlnet() -> Any:
    from diffusers import SD3ControlNetModel

    network = loaded(transformers.sd3_folder).transformer
    hints = SD3ControlNetModel.from_transformer(network, num_layers=1)
    return variant(
        "StableDiffusion3ControlNetPipeline", transformers.sd3_folder, controlnet=without_zeros(hints)
    )


@tiny("FluxControlNetPipeline", inputs={"control_image": 16}, **MIDDLE)
def flux_with_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    network = loaded(transformers.flux_folder).transformer
    hints = FluxControlNetModel.from_transformer(
        network, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    return variant("FluxControlNetPipeline", transformers.flux_folder, controlnet=without_zeros(hints))


def _flux_channels(name: str, channels: int, inputs: dict[str, Any]) -> None:
    @tiny(name, inputs=inputs, **MIDDLE)
    def make() -> Any:
        from diffusers import FluxTransformer2DModel

        config = {
            **loaded(transformers.flux_folder).transformer.config,
            "in_channels": channels,
            "out_channels": 16,
        }
        return variant(name, transformers.flux_folder, transformer=FluxTransformer2DModel.from_config(config))


_flux_channels("FluxControlPipeline", 32, {"control_image": 16})
_flux_channels("FluxFillPipeline", 16 + 16 + 4, {"image": 16, "mask_image": 16})


@tiny("StableDiffusionXLInstructPix2PixPipeline", inputs={"image": 8}, **SMALL)
def sdxl_by_instruction() -> Any:
    from diffusers import UNet2DConditionModel

    config = {**loaded(transformers.sdxl_folder).unet.config, "in_channels": 8}
    network = UNet2DConditionModel.from_config(config)
    return variant("StableDiffusionXLInstructPix2PixPipeline", transformers.sdxl_folder, unet=network)
