"""Pipelines whose text encoder is a language model: Qwen-Image, FLUX.2, Z-Image."""

from __future__ import annotations

from typing import Any

from tests.models.catalogue.encoders import qwen, qwen_vision
from tests.models.catalogue.entry import tiny
from tests.models.catalogue.images import SMALL, flow
from tests.models.pipelines import TEXT_WIDTH


def qwen_image() -> dict[str, Any]:
    import diffusers

    encoder, tokenizer = qwen_vision()
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": flow(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }


def _qwen_image(name: str, inputs: dict[str, Any] | None = None) -> None:
    @tiny(
        name,
        inputs=inputs,
        height=32,
        width=32,
        negative_prompts=["bad"],
        arguments={"true_cfg_scale": 3.0, "max_sequence_length": 16},
    )
    def make() -> Any:
        import diffusers

        return getattr(diffusers, name)(**qwen_image())


_qwen_image("QwenImagePipeline")
_qwen_image("QwenImageImg2ImgPipeline", {"image": 32})
_qwen_image("QwenImageInpaintPipeline", {"image": 32, "mask_image": 32})


@tiny("Flux2KleinPipeline", **SMALL, arguments={"max_sequence_length": 16, "text_encoder_out_layers": [1]})
def flux2_klein() -> Any:
    import diffusers

    encoder, tokenizer = qwen(head=True)
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
        vae=diffusers.AutoencoderKLFlux2(
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )


def z_image() -> dict[str, Any]:
    import diffusers
    import torch

    encoder, tokenizer = qwen()
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=TEXT_WIDTH,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):  # which are not initialized
        token.data = torch.ones_like(token)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=0.0,
    )
    return {
        "transformer": network,
        "vae": vae,
        "scheduler": flow(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }


@tiny("ZImagePipeline", height=32, width=32, guidance=3.0, arguments={"max_sequence_length": 16})
def z_image_text() -> Any:
    import diffusers

    return diffusers.ZImagePipeline(**z_image())
