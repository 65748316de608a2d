"""A LoRA that is fused while a model is imported computes what the layers computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdeploy.model.folder import open_model
from qdeploy.model.importing.lora import Lora
from qdeploy.model.importing.run import import_model
from qdeploy.system.errors import InvalidInputError, UsageError

Run = Callable[..., Result]
RANK = 2


def factors(model: Any, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for the attention of a U-Net, and one convolution, by path."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, module in model.build().named_modules():
        weight = getattr(module, "weight", None)
        if path.endswith(("to_q", "to_v", "to_out.0", "resnets.0.conv1")) and weight is not None:
            down = torch.randn(RANK, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator)
            found[path] = down, up
    return found


def product(down: Tensor, up: Tensor) -> Tensor:
    """The change of the weight, by sums over the rank."""
    return sum(up[:, r].reshape(-1, *[1] * (down.ndim - 1)) * down[r][None] for r in range(RANK))  # type: ignore


def as_peft(parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"unet.{path}.lora_{letter}.weight": tensor
        for path, pair in parts.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def as_kohya(parts: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    found = {}
    for path, (down, up) in parts.items():
        name = "lora_unet_" + path.replace(".", "_")
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize(("layout", "strength"), [("peft", 1.0), ("kohya", 0.5)])
def test_fused_weights_are_those_of_the_layers_beside_them(
    layout: str, strength: float, stable_diffusion: Path, tmp_path: Path
) -> None:
    model = open_model(stable_diffusion)
    parts = factors(model)
    if layout == "kohya":  # names with underscores, which are mapped back by diffusers
        parts = {path: pair for path, pair in parts.items() if "attentions" in path}
    tensors = as_peft(parts) if layout == "peft" else as_kohya(parts, strength * RANK)
    save_file(tensors, tmp_path / "lora.safetensors")
    fused = import_model(stable_diffusion, tmp_path / "fused", loras=[f"{tmp_path}/lora.safetensors:0.8"])
    before, after = load_file(model.weights[0]), load_file(fused.weights[0])
    assert fused.sha256 != model.sha256
    for name, tensor in before.items():
        pair = parts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = tensor if pair is None else tensor + 0.8 * strength * product(*pair)
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)
    assert len(parts) >= 5


def test_two_lora_add_up_and_their_scales_count(stable_diffusion: Path, tmp_path: Path) -> None:
    model = open_model(stable_diffusion)
    for seed in (1, 2):
        save_file(as_peft(factors(model, seed)), tmp_path / f"{seed}.safetensors")
    both = [f"{tmp_path}/1.safetensors:0.5", f"{tmp_path}/2.safetensors:-1"]
    fused = import_model(stable_diffusion, tmp_path / "fused", loras=both)
    name, one, two = next((name, pair, factors(model, 2)[name]) for name, pair in factors(model, 1).items())
    before, after = (load_file(each.weights[0])[f"{name}.weight"] for each in (model, fused))
    torch.testing.assert_close(after, before + 0.5 * product(*one) - product(*two), atol=1e-6, rtol=1e-5)


def test_a_lora_for_another_model_is_refused(stable_diffusion: Path, ddpm: Path, tmp_path: Path) -> None:
    parts = factors(open_model(stable_diffusion))

    def refused(match: str, tensors: dict[str, Tensor], model: Path = stable_diffusion) -> None:
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(InvalidInputError, match=match):
            import_model(model, tmp_path / "out", loras=[str(tmp_path / "lora.safetensors")])
        assert not (tmp_path / "out").exists()

    refused("takes no LoRA", as_peft(parts), ddpm)
    path, (down, up) = next(iter(parts.items()))
    refused("belongs to another model", as_peft({path: (torch.cat([down, down], 1), up)}))
    refused("belongs to another model", as_peft({path: (down, torch.cat([up, up]))}))
    refused("belongs to another model", as_peft({"down_blocks.7.attentions.0.to_q": (down, up)}))
    refused("is no LoRA", {f"unet.{path}.lora_B.weight": up})
    refused("is no LoRA", {"unet.conv_in.weight": torch.zeros(3)})
    refused("no LoRA layer", as_peft(parts) | {f"unet.{path}.lora_magnitude_vector": torch.zeros(8)})


def test_what_names_a_lora(tmp_path: Path) -> None:
    assert Lora.parse("a.safetensors") == Lora(Path("a.safetensors"))
    assert Lora.parse("a.safetensors:0.8") == Lora(Path("a.safetensors"), 0.8)
    assert Lora.parse("C:/a.safetensors") == Lora(Path("C:/a.safetensors"))
    with pytest.raises(UsageError, match="no finite number"):
        Lora.parse("a.safetensors:inf")


def test_a_folder_without_a_lora_needs_no_import(
    qdeploy: Run, stable_diffusion: Path, tmp_path: Path
) -> None:
    result = qdeploy("import", stable_diffusion, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--lora" in result.stderr
    missing = qdeploy("import", stable_diffusion, "-o", tmp_path / "out", "--lora", tmp_path / "nowhere")
    assert missing.exit_code == 5
    assert "does not exist" in missing.stderr
