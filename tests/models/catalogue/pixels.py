"""DeepFloyd IF, which samples pixels, and latent diffusion of before Stable Diffusion."""

from __future__ import annotations

from typing import Any

from tests.models.catalogue.entry import tiny
from tests.models.catalogue.images import MIDDLE, SMALL
from tests.models.catalogue.stable_diffusion import scheduler
from tests.models.networks import condition_unet, tiny_unet
from tests.models.pipelines import TEXT_WIDTH, make_text_encoder, make_vae
from tests.models.transformers import t5


def stage_one(channels: int = 3, classes: str | None = None) -> Any:
    """DeepFloyd IF's U-Net, as small as it goes."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=channels,
        out_channels=6,
        cross_attention_dim=16,
        encoder_hid_dim=TEXT_WIDTH,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
        class_embed_type=classes,
    )


def noising(**options: Any) -> Any:
    import diffusers

    return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", **options)


def deep_floyd(channels: int = 3, classes: str | None = None) -> dict[str, Any]:
    encoder, tokenizer = t5()
    learned = noising(variance_type="learned_range", thresholding=True, sample_max_value=1.0)
    return {
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": stage_one(channels, classes),
        "scheduler": learned,
        "watermarker": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@tiny("IFPipeline", **MIDDLE)
def pixels() -> Any:
    import diffusers

    return diffusers.IFPipeline(**deep_floyd())


@tiny("IFImg2ImgPipeline", inputs={"image": 16}, guidance=3.0)
def pixels_from_image() -> Any:
    import diffusers

    return diffusers.IFImg2ImgPipeline(**deep_floyd())


@tiny("IFInpaintingPipeline", inputs={"image": 16, "mask_image": 16}, guidance=3.0)
def pixels_inpainted() -> Any:
    import diffusers

    return diffusers.IFInpaintingPipeline(**deep_floyd())


@tiny("IFSuperResolutionPipeline", inputs={"image": 8}, **MIDDLE)
def pixels_enlarged() -> Any:
    import diffusers

    return diffusers.IFSuperResolutionPipeline(**deep_floyd(6, "timestep"), image_noising_scheduler=noising())


@tiny("LDMTextToImagePipeline", **SMALL)
def latent_diffusion() -> Any:
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    _, tokenizer = make_text_encoder()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        head_dim=8,
        max_position_embeddings=77,
    )
    return diffusers.LDMTextToImagePipeline(
        vqvae=make_vae(8),
        bert=LDMBertModel(config).eval(),
        tokenizer=tokenizer,
        unet=condition_unet(),
        scheduler=scheduler(),
    )


@tiny("LDMPipeline", prompts=None)
def latent_vq() -> Any:
    import diffusers

    vq = diffusers.VQModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
    )
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.LDMPipeline(vqvae=vq, unet=network, scheduler=diffusers.DDIMScheduler())


@tiny("DDIMPipeline", prompts=None)
def implicit() -> Any:
    import diffusers

    return diffusers.DDIMPipeline(unet=tiny_unet(), scheduler=diffusers.DDIMScheduler())
