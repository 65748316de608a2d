"""Tiny stock pipelines that call their denoisers in other ways than text-to-image does.

Tuples of tensors, integers, bool masks, dictionaries, several calls a step, two experts, class labels, other results
than images: each has one of them and is as small as its classes allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.networks import condition_unet
from tests.models.pipelines import (
    PROMPT_LENGTH,
    TEXT_WIDTH,
    make_image_encoder,
    make_image_processor,
    make_text_encoder,
    make_vae,
    saved,
    seeded,
)
from tests.models.transformers import t5


def cogvideox_folder(path: Path, *, rotary: bool = True, seed: int = 0) -> Path:
    """A `CogVideoXPipeline`: the rotary embedding is a tuple of two tensors without a batch axis; makes videos."""
    import diffusers as d

    with seeded(seed):
        transformer = d.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=TEXT_WIDTH,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=PROMPT_LENGTH,
            use_rotary_positional_embeddings=rotary,
            use_learned_positional_embeddings=False,
        )
        vae = d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        encoder, tokenizer = t5()
    pipeline = d.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=d.CogVideoXDDIMScheduler(),
    )
    return saved(pipeline, path)


def ltx_folder(path: Path, *, seed: int = 0) -> Path:
    """An `LTXPipeline`: the sizes of the video are integers among the denoiser's arguments."""
    import diffusers as d

    with seeded(seed):
        transformer = d.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=TEXT_WIDTH,
        )
        vae = d.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        encoder, tokenizer = t5()
    pipeline = d.LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return saved(pipeline, path)


def wan_folder(path: Path, *, experts: bool = False, seed: int = 0) -> Path:
    """A `WanPipeline`: guidance in two calls a step; keeps its own denoiser whatever it is given."""
    import diffusers as d

    def transformer() -> Any:
        return d.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )

    with seeded(seed):
        vae = d.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        vae.config["latents_mean"], vae.config["latents_std"] = [0.0] * 4, [1.0] * 4
        encoder, tokenizer = t5()
        low, high = transformer(), transformer() if experts else None
    pipeline = d.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=low,
        transformer_2=high,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.5 if experts else None,
    )
    return saved(pipeline, path)


def lcm_folder(path: Path, *, seed: int = 0) -> Path:
    """A `LatentConsistencyModelPipeline`: guidance enters the U-Net as ``timestep_cond``."""
    import diffusers as d

    with seeded(seed):
        unet = condition_unet(time_cond_proj_dim=32)
        (encoder, tokenizer), vae = make_text_encoder(), make_vae(8)
    pipeline = d.LatentConsistencyModelPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=d.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, path)


def consistency_folder(path: Path, *, classes: int | None = 5, seed: int = 0) -> Path:
    """A `ConsistencyModelPipeline`: class labels, and timesteps that are ``250 ln(sigma)``."""
    import diffusers as d

    with seeded(seed):
        unet = d.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=classes,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    scheduler = d.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return saved(d.ConsistencyModelPipeline(unet=unet, scheduler=scheduler), path)


def prior_folder(path: Path, *, seed: int = 0) -> Path:
    """A `KandinskyV22PriorPipeline`: a bool mask of the prompt; makes embeddings."""
    import diffusers as d

    with seeded(seed):
        encoder, tokenizer = make_text_encoder(True)
        prior = d.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            embedding_dim=TEXT_WIDTH,
            num_layers=1,
            num_embeddings=PROMPT_LENGTH,
            additional_embeddings=4,
        )
        images = make_image_encoder()
    pipeline = d.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=images,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample_range=5.0,
        ),
        image_processor=make_image_processor(),
    )
    return saved(pipeline, path)


def video_folder(path: Path, *, seed: int = 0) -> Path:
    """A `TextToVideoSDPipeline`: samples of five axes, ``num_frames``, frames."""
    import diffusers as d

    with seeded(seed):
        (encoder, tokenizer), vae = make_text_encoder(), make_vae(8)
        unet = d.UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=TEXT_WIDTH,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    pipeline = d.TextToVideoSDPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=d.DDIMScheduler()
    )
    return saved(pipeline, path)
