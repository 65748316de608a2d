"""Text to image by transformers and cascades of several makers."""

from __future__ import annotations

from typing import Any

from tests.models.catalogue.encoders import bert, gemma
from tests.models.catalogue.entry import tiny
from tests.models.pipelines import TEXT_WIDTH, make_vae
from tests.models.transformers import t5

SMALL = {"height": 8, "width": 8, "guidance": 3.0}
MIDDLE = {"height": 16, "width": 16, "guidance": 3.0}


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def chroma() -> dict[str, Any]:
    import diffusers

    encoder, tokenizer = t5()
    return {
        "scheduler": flow(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "vae": make_vae(8, shift_factor=0.0),
        "transformer": diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=[2, 2, 4],
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
    }


@tiny("ChromaPipeline", **MIDDLE, arguments={"max_sequence_length": 16})
def chroma_text() -> Any:
    import diffusers

    return diffusers.ChromaPipeline(**chroma())


@tiny("ChromaImg2ImgPipeline", inputs={"image": 16}, **MIDDLE, arguments={"max_sequence_length": 16})
def chroma_image() -> Any:
    import diffusers

    return diffusers.ChromaImg2ImgPipeline(**chroma())


@tiny("AuraFlowPipeline", **SMALL)
def aura_flow() -> Any:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    _, tokenizer = t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=make_vae(8),
        scheduler=flow(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
    )


def sana() -> dict[str, Any]:
    import diffusers

    encoder, tokenizer = gemma()
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": flow(shift=3.0)}


def sana_transformer(**changes: Any) -> Any:
    import diffusers

    small = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
    }
    small |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": TEXT_WIDTH}
    small |= {"patch_size": 1, "in_channels": 4, "out_channels": 4, "sample_size": 16}
    return diffusers.SanaTransformer2DModel(**{**small, **changes})


_SANA = {"max_sequence_length": 16, "complex_human_instruction": None}


@tiny("SanaPipeline", height=32, width=32, guidance=3.0, arguments=_SANA)
def sana_text() -> Any:
    import diffusers

    return diffusers.SanaPipeline(**sana(), transformer=sana_transformer())


@tiny("SanaPAGPipeline", height=32, width=32, guidance=3.0, arguments={**_SANA, "pag_scale": 2.0})
def sana_with_pag() -> Any:
    import diffusers

    return diffusers.SanaPAGPipeline(
        **sana(), transformer=sana_transformer(), pag_applied_layers=["transformer_blocks.0"]
    )


@tiny("SanaSprintPipeline", steps=2, height=32, width=32, guidance=3.0, arguments=_SANA)
def sana_sprint() -> Any:
    import diffusers

    network = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintPipeline(
        **{**sana(), "scheduler": diffusers.SCMScheduler()}, transformer=network
    )


@tiny("Lumina2Pipeline", **MIDDLE, arguments={"max_sequence_length": 16})
def lumina2() -> Any:
    import diffusers

    encoder, tokenizer = gemma()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=[4, 2, 2],
            axes_lens=(64, 32, 32),
            cap_feat_dim=TEXT_WIDTH,
        ),
        vae=make_vae(8, shift_factor=0.0),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


@tiny("LuminaPipeline", **MIDDLE, arguments={"max_sequence_length": 16, "clean_caption": False})
def lumina() -> Any:
    import diffusers

    encoder, tokenizer = gemma()
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            learn_sigma=True,
            qk_norm=True,
            cross_attention_dim=TEXT_WIDTH,
            scaling_factor=1.0,
        ),
        vae=make_vae(8),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def hunyuan() -> dict[str, Any]:
    import diffusers

    encoder, tokenizer = bert()
    second, letters = t5()
    return {
        "transformer": diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=16,
            hidden_size=16,
            text_len=77,
            text_len_t5=256,
            activation_fn="gelu-approximate",
        ),
        "vae": make_vae(8),
        "scheduler": diffusers.DDPMScheduler(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": second,
        "tokenizer_2": letters,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@tiny("HunyuanDiTPipeline", **MIDDLE)
def hunyuan_text() -> Any:
    import diffusers

    return diffusers.HunyuanDiTPipeline(**hunyuan())


@tiny("HunyuanDiTPAGPipeline", **MIDDLE, arguments={"pag_scale": 2.0})
def hunyuan_with_pag() -> Any:
    import diffusers

    return diffusers.HunyuanDiTPAGPipeline(**hunyuan(), pag_applied_layers=["blocks.1"])


@tiny("CogView3PlusPipeline", **MIDDLE, arguments={"max_sequence_length": 16})
def cogview3() -> Any:
    import diffusers

    encoder, tokenizer = t5()
    return diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        vae=make_vae(8),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
