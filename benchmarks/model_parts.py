"""What stands around a denoiser in a text-to-image pipeline, with random weights and as little as will do.

The denoiser's inputs have the shapes that the real pipeline's have: the encoders' widths and numbers of tokens
are the real ones, their depth is not.
"""

from __future__ import annotations

from typing import Any

from qdeploy.model.zoo import find_zoo_model

CLIP_TOKENS, T5_TOKENS = 77, 120
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,"


def autoencoder() -> Any:
    """An autoencoder with four latent channels, eight pixels to a latent one."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def sd_autoencoder() -> Any:
    """The autoencoder of Stable Diffusion; its random decoder's images fill the range of colours."""
    import torch
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()
    with torch.inference_mode():
        network.decoder.conv_out.weight *= 0.5 / network.decode(torch.randn(1, 4, 8, 8)).sample.std()
    return network


def clip_text(width: int, layers: int = 1) -> tuple[Any, Any]:
    """A CLIP text encoder, of one layer if nothing else is asked for, with the tokenizer of the zoo's scenes."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    scenes = find_zoo_model("scenes")
    assert scenes is not None
    tokenizer = CLIPTokenizer.from_pretrained(scenes / "tokenizer", model_max_length=CLIP_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval(), tokenizer


def t5_text(width: int) -> tuple[Any, Any]:
    """A T5 encoder of one layer, with a tokenizer of letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocabulary = [(word, -float(place)) for place, word in enumerate(words)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_TOKENS)
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=64,
        d_ff=64,
        num_layers=1,
        num_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval(), tokenizer
