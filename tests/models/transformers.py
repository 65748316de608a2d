"""Tiny stock pipelines around the transformers of PixArt, Stable Diffusion 3 and Flux, and SDXL's U-Net.

Configurations are as small as the classes allow with everything that makes them special: two streams that attend
together, pooled prompts, positions as inputs, guidance as an input, sizes as conditions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.networks import condition_unet
from tests.models.pipelines import (
    LETTERS,
    PROMPT_LENGTH,
    TEXT_WIDTH,
    make_text_encoder,
    make_vae,
    saved,
    seeded,
)


def pixart_folder(path: Path, *, size: int = 8, seed: int = 0) -> Path:
    """A `PixArtAlphaPipeline`: one embedding of the timestep for all blocks, prompts by cross-attention."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    with seeded(seed):
        transformer = PixArtTransformer2DModel(
            sample_size=size,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
        vae, (text_encoder, tokenizer) = make_vae(size), t5()
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    return saved(pipeline, path)


def sd3_folder(path: Path, *, size: int = 8, seed: int = 0) -> Path:
    """A `StableDiffusion3Pipeline`: image and text as two streams, pooled prompts, flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=size,
        )
        vae = make_vae(size, shift_factor=0.0)
        (first, tokenizer), (second, _) = make_text_encoder(True), make_text_encoder(True)
        third, letters = t5(2 * TEXT_WIDTH)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=letters,
    )
    return saved(pipeline, path)


def flux_folder(path: Path, *, size: int = 8, guidance: bool = True, seed: int = 0) -> Path:
    """A `FluxPipeline`: double and single blocks, positions and guidance as inputs, flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        vae = make_vae(size, shift_factor=0.0)
        (clip, clip_tokenizer), (encoder, tokenizer) = make_text_encoder(), t5()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    return saved(pipeline, path)


def sdxl_folder(path: Path, *, size: int = 8, seed: int = 0) -> Path:
    """A `StableDiffusionXLPipeline`: pooled prompt and sizes are added to the time embedding."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with seeded(seed):
        unet = condition_unet(
            sample_size=size,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 4,
        )
        vae = make_vae(size)
        (first, tokenizer), (second, _) = make_text_encoder(), make_text_encoder(True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )
    return saved(pipeline, path)


def t5(width: int = TEXT_WIDTH) -> tuple[Any, Any]:
    """A T5 encoder and a tokenizer of letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = T5Tokenizer(
        vocab=[(word, -float(place)) for place, word in enumerate(words)],
        extra_ids=0,
        model_max_length=PROMPT_LENGTH,
    )
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=8,
        d_ff=TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval(), tokenizer
