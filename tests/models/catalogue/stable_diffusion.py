"""Stable Diffusion's family: one U-Net on prompts, in pipelines that take images, masks, hints and guidance apart."""

from __future__ import annotations

from inspect import signature
from typing import Any

from tests.models.catalogue.entry import tiny, without_zeros
from tests.models.networks import condition_unet
from tests.models.pipelines import (
    TEXT_WIDTH,
    make_image_encoder,
    make_image_processor,
    make_text_encoder,
    make_vae,
)

GUIDED = {"guidance": 3.0}


def scheduler(name: str = "DDIMScheduler") -> Any:
    import diffusers

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**schedule, clip_sample=False, steps_offset=1)


def controlnet(network: Any, **changes: Any) -> Any:
    from diffusers import ControlNetModel

    return without_zeros(
        ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4,), **changes)
    )


def parts(**changes: Any) -> dict[str, Any]:
    """The components of a `StableDiffusionPipeline`."""
    encoder, tokenizer = make_text_encoder()
    return {
        "vae": make_vae(8),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": condition_unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **changes,
    }


@tiny("StableDiffusionPipeline", **GUIDED)
def text_to_image() -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline(**parts())


@tiny("StableDiffusionImg2ImgPipeline", inputs={"image": 8}, **GUIDED)
def image_to_image() -> Any:
    import diffusers

    return diffusers.StableDiffusionImg2ImgPipeline(**parts())


@tiny("StableDiffusionInpaintPipeline", inputs={"image": 8, "mask_image": 8}, height=8, width=8, **GUIDED)
def inpainting() -> Any:
    import diffusers

    return diffusers.StableDiffusionInpaintPipeline(**parts(unet=condition_unet(in_channels=9)))


@tiny("StableDiffusionControlNetPipeline", inputs={"image": 8}, **GUIDED)
def with_controlnet() -> Any:
    import diffusers

    network = condition_unet()
    return diffusers.StableDiffusionControlNetPipeline(**parts(unet=network, controlnet=controlnet(network)))


def _plain(name: str, inputs: dict[str, Any] | None = None, **options: Any) -> None:
    """A pipeline with the components of Stable Diffusion."""

    @tiny(name, inputs=inputs, **{**GUIDED, **options})
    def make() -> Any:
        import diffusers

        kind = getattr(diffusers, name)
        return kind(**parts(**{key: None for key in ("image_encoder",) if key in signature(kind).parameters}))


def _hinted(name: str, inputs: dict[str, Any], **options: Any) -> None:
    """A pipeline with a ControlNet."""

    @tiny(name, inputs=inputs, **{**GUIDED, **options})
    def make() -> Any:
        import diffusers

        network = condition_unet()
        return getattr(diffusers, name)(**parts(unet=network, controlnet=controlnet(network)))


_plain("StableDiffusionPAGPipeline", arguments={"pag_scale": 2.0})
_plain("StableDiffusionPAGImg2ImgPipeline", {"image": 8}, arguments={"pag_scale": 2.0})
_plain("StableDiffusionPanoramaPipeline", height=8, width=8)
_plain("StableDiffusionSAGPipeline")
_plain("StableDiffusionLDM3DPipeline")
_plain("SemanticStableDiffusionPipeline")
_hinted("StableDiffusionControlNetImg2ImgPipeline", {"image": 8, "control_image": 8})
_hinted("StableDiffusionControlNetInpaintPipeline", {"image": 8, "mask_image": 8, "control_image": 8})
_hinted("StableDiffusionControlNetPAGPipeline", {"image": 8}, arguments={"pag_scale": 2.0})


@tiny("StableDiffusionAdapterPipeline", inputs={"image": 16}, height=16, width=16, **GUIDED)
def with_adapter() -> Any:
    import diffusers

    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=(8, 16), num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    network = condition_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    given = parts(adapter=adapter, vae=make_vae(8, (8, 8)), unet=network)
    return diffusers.StableDiffusionAdapterPipeline(**given)


@tiny("StableDiffusionInstructPix2PixPipeline", inputs={"image": 8}, **GUIDED)
def by_instruction() -> Any:
    import diffusers

    return diffusers.StableDiffusionInstructPix2PixPipeline(**parts(unet=condition_unet(in_channels=8)))


@tiny("StableDiffusionUpscalePipeline", inputs={"image": 8}, **GUIDED)
def upscaling() -> Any:
    import diffusers

    network = condition_unet(in_channels=7, num_class_embeds=1000)
    given = parts(unet=network, low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=350)
    del given["requires_safety_checker"]
    return diffusers.StableDiffusionUpscalePipeline(**given)


@tiny("StableDiffusionImageVariationPipeline", prompts=None, inputs={"image": 32}, **GUIDED)
def variation() -> Any:
    import diffusers

    given = parts(image_encoder=make_image_encoder(), feature_extractor=make_image_processor())
    del given["text_encoder"], given["tokenizer"]
    return diffusers.StableDiffusionImageVariationPipeline(**given)


BOXES = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}


@tiny("StableDiffusionGLIGENPipeline", arguments=BOXES, **GUIDED)
def gligen() -> Any:
    import diffusers

    return diffusers.StableDiffusionGLIGENPipeline(**parts(unet=condition_unet(attention_type="gated")))


@tiny("LatentConsistencyModelImg2ImgPipeline", inputs={"image": 8}, guidance=8.0)
def consistency_image_to_image() -> Any:
    import diffusers

    return diffusers.LatentConsistencyModelImg2ImgPipeline(
        **parts(unet=condition_unet(time_cond_proj_dim=32), scheduler=scheduler("LCMScheduler"))
    )


def motion() -> dict[str, Any]:
    """The components of an `AnimateDiffPipeline`."""
    from diffusers import MotionAdapter

    given = parts(unet=condition_unet(attention_head_dim=4))
    del given["safety_checker"], given["requires_safety_checker"]
    given["motion_adapter"] = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    return given


FRAMES = {"num_frames": 2}


@tiny("AnimateDiffPipeline", height=8, width=8, arguments=FRAMES, **GUIDED)
def animated() -> Any:
    import diffusers

    return diffusers.AnimateDiffPipeline(**motion())


@tiny("AnimateDiffPAGPipeline", height=8, width=8, arguments={**FRAMES, "pag_scale": 2.0}, **GUIDED)
def animated_with_pag() -> Any:
    import diffusers

    return diffusers.AnimateDiffPAGPipeline(**motion(), pag_applied_layers="mid")


@tiny(
    "AnimateDiffVideoToVideoPipeline", inputs={"video": ("video", 2, 8)}, height=8, width=8, batch=1, **GUIDED
)
def animated_video() -> Any:
    import diffusers

    return diffusers.AnimateDiffVideoToVideoPipeline(**motion())


@tiny(
    "AnimateDiffControlNetPipeline",
    inputs={"conditioning_frames": ("video", 2, 8)},
    height=8,
    width=8,
    batch=1,
    arguments=FRAMES,
    **GUIDED,
)
def animated_with_hint() -> Any:
    import diffusers

    given = motion()
    return diffusers.AnimateDiffControlNetPipeline(**given, controlnet=controlnet(given["unet"]))


@tiny(
    "StableVideoDiffusionPipeline",
    None,
    {"image": 32},
    height=32,
    width=32,
    arguments={"num_frames": 2},
    batch=1,
)
def from_image_to_video() -> Any:
    import diffusers

    network = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=(4, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    return diffusers.StableVideoDiffusionPipeline(
        unet=network,
        vae=vae,
        image_encoder=make_image_encoder(image_size=224, patch_size=112),
        feature_extractor=make_image_processor(),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
    )
