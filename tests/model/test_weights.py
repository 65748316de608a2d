"""A denoiser's weights are those that diffusers loads, whatever else lies in the folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from qdeploy.model.folder import open_model
from qdeploy.model.weights import find_weights
from qdeploy.system.errors import InvalidInputError
from tests.models.pipelines import ddpm_folder, dit_folder, stable_diffusion_folder

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal tensors, and the first has all its floats in float32."""
    ours, theirs = one.state_dict(), other.state_dict()
    whole = all(tensor.dtype == torch.float32 for tensor in ours.values() if tensor.is_floating_point())
    return (
        whole and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k].float()) for k in ours)
    )


def rewrite(folder: Path, variant: str | None = None, size: str = "5GB", scale: float = 1.0) -> None:
    """Save the U-Net in ``folder`` once more beside itself, in another form and with other numbers."""
    unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter *= scale
    kept = {file: file.read_bytes() for file in folder.glob("*.safetensors*")}
    unet.save_pretrained(folder, variant=variant, max_shard_size=size)
    for file, content in kept.items():
        file.write_bytes(content)


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return ddpm_folder(tmp_path / "model") / "unet"


def loaded(unet: Path) -> nn.Module:
    return open_model(unet.parent).load()


def test_another_variant_beside_the_weights_is_not_read(unet: Path) -> None:
    rewrite(unet, "bf16", scale=0.5)
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet))
    assert [file.name for file in find_weights(unet).unread] == ["diffusion_pytorch_model.bf16.safetensors"]


def test_the_shards_of_an_index_are_read_and_an_older_single_file_is_not(unet: Path) -> None:
    rewrite(unet, size="20KB", scale=0.5)
    found = find_weights(unet)
    assert len(found.files) > 1
    assert [file.name for file in found.unread] == [SINGLE]
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet))


def test_shards_of_a_variant_beside_a_plain_index_are_not_read(unet: Path) -> None:
    rewrite(unet, size="20KB")
    (unet / SINGLE).unlink()
    rewrite(unet, "fp16", size="20KB", scale=2.0)
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet))
    chosen = open_model(f"{unet.parent}@fp16").load()
    assert same_weights(chosen, UNet2DModel.from_pretrained(unet, variant="fp16"))


def test_a_shard_that_no_index_names_is_not_read(unet: Path) -> None:
    rewrite(unet, size="20KB")
    (unet / SINGLE).unlink()
    first = find_weights(unet).files[0]
    shutil.copy(first, unet / "diffusion_pytorch_model-00009-of-00009.safetensors")
    assert len(find_weights(unet).unread) == 1
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet))


def test_a_folder_with_one_variant_alone_is_loaded(unet: Path) -> None:
    rewrite(unet, "fp16", scale=0.5)
    (unet / SINGLE).unlink()
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet, variant="fp16"))


def test_of_two_variants_one_has_to_be_chosen(unet: Path) -> None:
    rewrite(unet, "fp16", scale=0.5)
    rewrite(unet, "bf16", scale=0.25)
    (unet / SINGLE).unlink()
    with pytest.raises(InvalidInputError, match="variants bf16, fp16, and none without"):
        loaded(unet)
    model = open_model(f"{unet.parent}@bf16")
    assert same_weights(model.load(), UNet2DModel.from_pretrained(unet, variant="bf16"))
    assert open_model(model.source).sha256 == model.sha256


def test_an_unknown_variant_is_refused_by_name(unet: Path) -> None:
    with pytest.raises(InvalidInputError, match="no weights of the variant 'fp8', but of the plain one"):
        open_model(f"{unet.parent}@fp8").load()


def test_an_index_that_names_a_missing_shard_is_refused(unet: Path) -> None:
    rewrite(unet, size="20KB")
    lost = find_weights(unet).files[1]
    lost.unlink()
    with pytest.raises(InvalidInputError, match=f"names {lost.name}, which is missing"):
        loaded(unet)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 7])
def test_an_index_that_leaves_its_folder_is_refused(unet: Path, name: object) -> None:
    (unet / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
    with pytest.raises(InvalidInputError, match=r"no file of its own folder|names 7"):
        loaded(unet)


def test_shards_without_their_index_are_refused(unet: Path) -> None:
    rewrite(unet, size="20KB")
    (unet / SINGLE).unlink()
    (unet / INDEX).unlink()
    with pytest.raises(InvalidInputError, match="without the index"):
        loaded(unet)


def test_pickled_weights_are_refused_with_the_reason(unet: Path) -> None:
    UNet2DModel.from_pretrained(unet).save_pretrained(unet, safe_serialization=False)
    (unet / SINGLE).unlink()
    with pytest.raises(InvalidInputError, match=r"\.bin alone, a pickle, which can run code"):
        loaded(unet)


def test_attention_names_of_before_2023_are_loaded_as_diffusers_does(unet: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name: str) -> str:
        for new, before in names.items():
            name = name.replace(new, before)
        return name

    state = {old(name): tensor for name, tensor in load_file(unet / SINGLE).items()}
    assert any(".query." in name for name in state)
    save_file(state, unet / SINGLE, metadata={"format": "pt"})
    assert same_weights(loaded(unet), UNet2DModel.from_pretrained(unet))


def test_the_class_name_of_before_diffusers_split_its_transformers_is_loaded(tmp_path: Path) -> None:
    folder = dit_folder(tmp_path / "dit") / "transformer"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert same_weights(loaded(folder), DiTTransformer2DModel.from_pretrained(folder))


def test_tensors_that_a_class_ignores_by_design_are_ignored(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / SINGLE)
    save_file({**state, "blocks.0.norm_added_q.weight": torch.ones(2)}, tmp_path / SINGLE)
    assert same_weights(open_model(tmp_path).load(), network)


def test_lora_layers_that_are_not_fused_are_named(unet: Path) -> None:
    state = load_file(unet / SINGLE)
    name = next(name for name in state if name.endswith("to_q.weight"))
    state[name.replace("weight", "base_layer.weight")] = state.pop(name)
    state[name.replace("weight", "lora_A.default.weight")] = torch.zeros(4, 16)
    save_file(state, unet / SINGLE)
    with pytest.raises(InvalidInputError, match="LoRA layers that are not fused"):
        loaded(unet)


def test_a_hub_cache_of_symbolic_links_is_loaded(unet: Path, tmp_path: Path) -> None:
    rewrite(unet, size="20KB")
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123456"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in unet.parent.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(unet.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    model = open_model(snapshot)
    assert same_weights(model.load(), UNet2DModel.from_pretrained(unet))
    assert model.sha256 == open_model(unet.parent).sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [None, "fp16"], ids=["plain", "variant"])
def test_every_component_of_a_half_precision_folder_loads_in_float32(
    tmp_path: Path, dtype: torch.dtype, variant: str | None
) -> None:
    source = stable_diffusion_folder(tmp_path / "source")
    stored = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
    stored.save_pretrained(tmp_path / "half", variant=variant)
    pipeline = open_model(tmp_path / "half").pipeline()
    for name in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(pipeline, name), getattr(stored, name)), name


def test_components_in_variants_and_plain_ones_load_together(tmp_path: Path) -> None:
    source = stable_diffusion_folder(tmp_path / "source")
    half = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16)
    half.vae.save_pretrained(source / "vae", variant="fp16")
    (source / "vae" / SINGLE).unlink()
    assert same_weights(open_model(source).pipeline().vae, half.vae)
