"""Kandinsky 2.2 and Stable Cascade: priors that make embeddings, and decoders that take them."""

from __future__ import annotations

from typing import Any

from tests.models.catalogue.entry import tiny
from tests.models.pipelines import TEXT_WIDTH, make_text_encoder


def kandinsky(**changes: Any) -> dict[str, Any]:
    import diffusers

    network = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "addition_embed_type": "image",
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "encoder_hid_dim": TEXT_WIDTH,
            "encoder_hid_dim_type": "image_proj",
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
            **changes,
        }
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 64),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        num_vq_embeddings=12,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    steps = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return {"unet": network, "movq": movq, "scheduler": diffusers.DDIMScheduler(**steps)}


_EMBEDDED: dict[str, Any] = {"image_embeds": (TEXT_WIDTH,), "negative_image_embeds": (TEXT_WIDTH,)}


def _kandinsky(
    name: str, inputs: dict[str, Any], arguments: dict[str, Any] | None = None, **changes: Any
) -> None:
    options = {} if arguments is None else {"arguments": arguments}

    @tiny(name, None, {**_EMBEDDED, **inputs}, height=64, width=64, guidance=3.0, **options)
    def make() -> Any:
        import diffusers

        return getattr(diffusers, name)(**kandinsky(**changes))


_kandinsky("KandinskyV22Pipeline", {})
_kandinsky("KandinskyV22Img2ImgPipeline", {"image": 64}, arguments={"strength": 1.0})
_kandinsky("KandinskyV22InpaintPipeline", {"image": 64, "mask_image": 64}, in_channels=9)
_kandinsky(
    "KandinskyV22ControlnetPipeline", {"hint": (3, 256, 256)}, in_channels=8, addition_embed_type="image_hint"
)


def cascade(**changes: Any) -> Any:
    import diffusers

    small: dict[str, Any] = {
        "conditioning_dim": 16,
        "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        "switch_level": (False,),
        "clip_text_pooled_in_channels": TEXT_WIDTH,
        "clip_text_in_channels": TEXT_WIDTH,
        "clip_image_in_channels": TEXT_WIDTH,
    }
    return diffusers.StableCascadeUNet(**{**small, **changes})


@tiny("StableCascadePriorPipeline", height=128, width=128, guidance=3.0)
def cascade_prior() -> Any:
    import diffusers

    encoder, tokenizer = make_text_encoder(True)
    return diffusers.StableCascadePriorPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        prior=cascade(in_channels=4, out_channels=4, conditioning_dim=16),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


@tiny("StableCascadeDecoderPipeline", inputs={"image_embeddings": (4, 2, 2)}, guidance=3.0)
def cascade_decoder() -> Any:
    import diffusers
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    encoder, tokenizer = make_text_encoder(True)
    return diffusers.StableCascadeDecoderPipeline(
        decoder=cascade(
            in_channels=4,
            out_channels=4,
            patch_size=2,
            effnet_in_channels=4,
            clip_text_in_channels=None,
            clip_image_in_channels=None,
        ),
        tokenizer=tokenizer,
        text_encoder=encoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8),
        latent_dim_scale=4.0,
    )
