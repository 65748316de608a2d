"""Networks of well-known shapes with random weights: for questions of size and speed, which weights do not decide.

And the models of the zoo, which are trained. What a conditional network needs around it to be sampled, a text
encoder and an autoencoder, is as small as its class allows (`benchmarks/model_parts.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.model_parts import autoencoder, clip_text, sd_autoencoder, t5_text
from qdeploy.model.zoo import find_zoo_model
from qdeploy.store.files import write_json

# google/ddpm-cifar10-32's unet/config.json
CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# stable-diffusion-v1-5's unet/config.json; what it leaves out are the class's defaults
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# the same at half its width: 217 million parameters
SD217: dict[str, Any] = {**SD15, "sample_size": 32, "block_out_channels": (160, 320, 640, 640)}
# two of its four levels, with one block each, as a denoiser alone: 44 million parameters, for questions about kernels
SD44: dict[str, Any] = {
    **SD15,
    "sample_size": 32,
    "block_out_channels": (320, 640),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": None,
}
# stable-diffusion-xl-base-1.0's unet/config.json, likewise
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# the same network on images of 512 pixels: the weights are as many, the work a quarter
SDXL_512: dict[str, Any] = {**SDXL, "sample_size": 64}
# PixArt-alpha/PixArt-XL-2-256x256's transformer/config.json, with 8 of its 28 blocks
PIXART: dict[str, Any] = {
    "sample_size": 32,
    "num_layers": 8,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "use_additional_conditions": False,
}
# the same with all of its 28 blocks: 611 million parameters
PIXART_XL: dict[str, Any] = {**PIXART, "num_layers": 28}
SHARD = 2**30  # bytes
ZOO = ("digits", "scenes", "digits-dit")
UNETS = ("digits", "cifar", "sd15", "sd44")  # the shapes of benchmarks that are not about conditions
SHAPES = (*UNETS[:-1], "scenes", "digits-dit", "pixart")  # pipelines; `sdxl` and `sd44` are denoisers alone
PROMPTS = ("a large red circle", "a small blue square above a green ring")


def model_folder(shape: str, folder: Path) -> Path:
    """A diffusers folder of that shape; made if it is not there yet.

    ``sdxl`` and ``sdxl-512`` are a denoiser alone, in bfloat16, ``sd44`` is one in float32; the others are pipelines
    in float32.
    """
    if shape in ZOO:
        found = find_zoo_model(shape)
        assert found is not None
        return found
    path = folder / shape
    if not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        torch.manual_seed(0)
        if shape.startswith("sdxl"):
            write_at_random(SDXL if shape == "sdxl" else SDXL_512, path)
        else:
            _make(shape).save_pretrained(path)
    return path


def write_at_random(config: dict[str, Any], path: Path) -> None:
    """A U-Net's folder with random weights in bfloat16, written in shards: the network is never in memory."""
    import diffusers
    from safetensors.torch import save_file

    from qdeploy.model.fill import without_parameters

    with without_parameters():
        network = diffusers.UNet2DConditionModel(**config)
    path.mkdir(parents=True)
    network.save_config(path)
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, int] = {}
    for name, parameter in network.state_dict().items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD:
            save_file(shards[-1], path / _shard(len(shards)), {"format": "pt"})
            shards[-1:] = [{}, {}]
        made = torch.zeros(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            made.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            made.fill_(1)
        shards[-1][name], places[name] = made, len(shards)
    save_file(shards[-1], path / _shard(len(shards)), {"format": "pt"})
    weights = {name: _shard(number) for name, number in places.items()}
    write_json(
        path / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": weights}
    )


def _shard(number: int) -> str:
    return f"diffusion_pytorch_model-{number:05d}.safetensors"


def store_in(folder: Path, name: str) -> Path:
    """Store the weights of all components of a folder in another type, such as ``bfloat16``."""
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        if any(
            tensor.dtype.is_floating_point and str(tensor.dtype) != f"torch.{name}"
            for tensor in tensors.values()
        ):
            stored = {
                key: tensor.to(getattr(torch, name)) if tensor.dtype.is_floating_point else tensor
                for key, tensor in tensors.items()
            }
            save_file(stored, file, {"format": "pt"})
    return folder


def _make(shape: str) -> Any:
    import diffusers

    if shape == "cifar":
        return diffusers.DDPMPipeline(diffusers.UNet2DModel(**CIFAR), diffusers.DDPMScheduler())
    if shape == "sd44":
        return diffusers.UNet2DConditionModel(**SD44)
    if shape in ("pixart", "pixart-xl"):
        config = PIXART if shape == "pixart" else PIXART_XL
        encoder, tokenizer = t5_text(PIXART["caption_channels"])
        return diffusers.PixArtAlphaPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=autoencoder(),
            transformer=diffusers.PixArtTransformer2DModel(**config),
            scheduler=diffusers.DDIMScheduler(),
        )
    whole = shape == "sd217"  # for questions about pipelines: nothing is smaller than its class allows
    encoder, tokenizer = clip_text(SD15["cross_attention_dim"], layers=12 if whole else 1)
    return diffusers.StableDiffusionPipeline(
        vae=sd_autoencoder() if whole else autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**(SD217 if whole else SD15)),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sampling(shape: str, steps: int, held_out: bool) -> dict[str, Any]:
    """How a shape is sampled for ``steps`` calls that are kept, as options of `qdeploy.collect`.

    Trained models are sampled as they are meant to be, with guidance where they have it, which gives two rows a
    call. Those of random weights are sampled without guidance, the large ones with no more steps than are kept.
    """
    if shape == "digits":
        return {}
    if shape == "digits-dit":  # class numbers come with the seeds
        return {"scheduler": "ddim", "steps": 20}
    if shape == "scenes":
        from tools.zoo.judge_scenes import held_out_prompts

        prompts = held_out_prompts(8, seed=int(held_out))
        return {"scheduler": "ddim", "steps": 20, "prompts": prompts}
    if shape == "cifar":
        return {"scheduler": "ddim", "steps": 20}
    return {"scheduler": "ddim", "steps": steps, "prompts": PROMPTS, "guidance": 1.0}
