"""Tiny diffusers pipelines with random weights, written to a folder in tens of milliseconds.

Nothing is downloaded: even the tokenizer is made here. The networks are as small as their classes allow, but
have all the kinds of layers that the large ones have: residual blocks, attention, up- and downsampling,
shortcuts over concatenated features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.models.networks import WIDTH, condition_unet

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,"
PROMPT_LENGTH = 8
TEXT_WIDTH = WIDTH


def ddpm_folder(
    path: Path, *, size: int = 8, channels: Sequence[int] = (8, 16), dropout: float = 0.1, seed: int = 0
) -> Path:
    """A `DDPMPipeline`: an unconditional `UNet2DModel` on RGB images of ``size`` pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    plain = len(channels) - 1
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=size,
            block_out_channels=tuple(channels),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            dropout=dropout,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        )
    return saved(DDPMPipeline(unet, DDPMScheduler()), path)


def stable_diffusion_folder(
    path: Path,
    *,
    size: int = 8,
    channels: Sequence[int] = (8, 16),
    vae_channels: Sequence[int] = (8,),
    seed: int = 0,
) -> Path:
    """A `StableDiffusionPipeline`: cross-attention on prompts, latents of ``size`` pixels, PNDM."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with seeded(seed):
        unet = condition_unet(channels, sample_size=size)
        vae, (text_encoder, tokenizer) = make_vae(size, vae_channels), make_text_encoder()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipeline, path)


def dit_folder(path: Path, *, size: int = 8, head: int = 4, seed: int = 0) -> Path:
    """A `DiTPipeline`: a class-conditional transformer with two heads, on latents of ``size`` pixels, DDIM."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with seeded(seed):
        transformer = DiTTransformer2DModel(
            sample_size=size,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=head,
            norm_num_groups=4,
            num_embeds_ada_norm=1000,  # the pipeline has 1000 wired in as the null class
        )
        vae = make_vae(size)
    return saved(DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler()), path)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def make_vae(size: int, channels: Sequence[int] = (8,), **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=size,
        latent_channels=4,
        block_out_channels=tuple(channels),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **options,
    )


def make_text_encoder(projected: bool = False) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    codes = {word: code for code, word in enumerate(words)}
    tokenizer = CLIPTokenizer(codes, [], model_max_length=PROMPT_LENGTH)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=TEXT_WIDTH,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(config).eval(), tokenizer


def make_image_encoder(**changes: Any) -> Any:
    """CLIP's image encoder, whose embeddings are as wide as those of prompts."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {"hidden_size": 16, "image_size": 32, "projection_dim": TEXT_WIDTH, "intermediate_size": 16}
    small |= {"num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 1, "patch_size": 16}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**small, **changes})).eval()


def make_image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(crop_size=32, size=32)


def saved(pipeline: Any, path: Path) -> Path:
    pipeline.save_pretrained(path)
    return path
