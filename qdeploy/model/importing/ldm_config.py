"""The YAML of a latent diffusion model (CompVis), in the words of diffusers' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.store.bounded_yaml import read_yaml
from qdeploy.system.errors import InvalidInputError

UNCONDITIONAL = "__is_unconditional__"
NULL_CLASS = 1000  # of `DiTPipeline`, and of ``cin256-v2``
# Parameters of UNetModel that change what it computes, and the one value that is supported.
_ONLY = {
    "dims": 2,
    "conv_resample": True,
    "num_classes": None,
    "n_embed": None,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "dropout": 0,
}


@dataclass(frozen=True)
class Level:
    """A resolution of the U-Net."""

    channels: int
    attends: bool


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What the YAML of a latent diffusion model says.

    Attributes:
        path: the file.
        params: of the whole model.
        unet: of ``UNetModel``.
        first_stage: of the autoencoder.
        classes: rows of the table of classes; None for an unconditional model.
    """

    path: Path
    params: Mapping[str, Any]
    unet: Mapping[str, Any]
    first_stage: Mapping[str, Any]
    classes: int | None

    @property
    def quantized(self) -> bool:
        """Whether the autoencoder has a codebook."""
        return "n_embed" in self.first_stage

    @property
    def levels(self) -> list[Level]:
        """The U-Net's resolutions, the highest first."""
        resolutions = self.unet["attention_resolutions"]
        width, mults = int(self.unet["model_channels"]), self.unet["channel_mult"]
        return [Level(width * mult, 2**number in resolutions) for number, mult in enumerate(mults)]

    @property
    def heads(self) -> list[int]:
        """Attention heads at each resolution."""
        each = self.unet.get("num_head_channels", -1)
        return [
            int(self.unet["num_heads"]) if each == -1 else level.channels // each for level in self.levels
        ]

    def unet_config(self) -> tuple[str, dict[str, Any]]:
        """The denoiser's class and its configuration."""
        transformers = self.classes is not None
        resizing = "resnet" if self.unet.get("resblock_updown") else "conv"
        found: dict[str, Any] = {
            "sample_size": self.unet["image_size"],
            "in_channels": self.unet["in_channels"],
            "out_channels": self.unet["out_channels"],
            "block_out_channels": [level.channels for level in self.levels],
            "down_block_types": [self._block("Down", level, transformers) for level in self.levels],
            "up_block_types": [self._block("Up", level, transformers) for level in reversed(self.levels)],
            "layers_per_block": self.unet["num_res_blocks"],
            "resnet_time_scale_shift": "scale_shift" if self.unet.get("use_scale_shift_norm") else "default",
        }
        if transformers:
            found |= {
                "num_classes": self.classes,
                "cross_attention_dim": self.unet["context_dim"],
                "transformer_layers_per_block": self.unet.get("transformer_depth", 1),
                "attention_head_dim": self.heads,
            }
            return "ClassUNet2DModel", found
        found |= {"downsample_type": resizing, "upsample_type": resizing, "attn_norm_num_groups": 32}
        widths = {
            level.channels // heads
            for number, (level, heads) in enumerate(zip(self.levels, self.heads, strict=True))
            if level.attends or number == len(self.levels) - 1
        }
        if len(widths) == 1:
            return "UNet2DModel", found | {"attention_head_dim": widths.pop()}
        return "HeadsUNet2DModel", found | {"num_attention_heads": self.heads[0], "attention_head_dim": None}

    def _block(self, way: str, level: Level, transformers: bool) -> str:
        if level.attends:
            return f"CrossAttn{way}Block2D" if transformers else f"Attn{way}Block2D"
        if not transformers and self.unet.get("resblock_updown"):
            return f"Resnet{way}sampleBlock2D"
        return f"{way}Block2D"

    def autoencoder_config(self) -> tuple[str, dict[str, Any]]:
        """The autoencoder's class and its configuration but for its scaling factor."""
        stage = self.first_stage["ddconfig"]
        levels = range(len(stage["ch_mult"]))
        attends = [stage["resolution"] // 2**level in stage["attn_resolutions"] for level in levels]
        found = {
            "in_channels": stage["in_channels"],
            "out_channels": stage["out_ch"],
            "latent_channels": stage["z_channels"],
            "sample_size": stage["resolution"],
            "block_out_channels": [stage["ch"] * mult for mult in stage["ch_mult"]],
            "layers_per_block": stage["num_res_blocks"],
            "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
            "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in reversed(attends)],
        }
        if self.quantized:
            codes = {"num_vq_embeddings": self.first_stage["n_embed"]}
            return "VQModel", found | codes | {"vq_embed_dim": self.first_stage["embed_dim"]}
        return "AutoencoderKL", found

    def scheduler_config(self) -> dict[str, Any]:
        """Of `DDIMScheduler`, with the timesteps of the original sampler: 1, 1 + c, 1 + 2c, ..."""
        kind = self.params.get("parameterization", "eps")
        return {
            "num_train_timesteps": self.params.get("timesteps", 1000),
            "beta_start": self.params.get("linear_start", 1e-4),
            "beta_end": self.params.get("linear_end", 2e-2),
            "beta_schedule": "scaled_linear",
            "prediction_type": {"eps": "epsilon", "x0": "sample"}[kind],
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }


def read_config(path: Path) -> LatentDiffusionConfig:
    """Read the YAML of a latent diffusion model.

    Raises:
        InvalidInputError: it cannot be read, or describes another architecture than a U-Net over the latents of a VQ
            or KL autoencoder, without condition or with classes.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as YAML: {error}") from error
    try:
        params = content["model"]["params"]
        unet, stage = params["unet_config"], params["first_stage_config"]
        targets = [str(part["target"]).rpartition(".")[2] for part in (content["model"], unet, stage)]
        condition = params["cond_stage_config"]
        found = LatentDiffusionConfig(
            path, params, unet["params"], stage["params"], _classes(path, condition)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} is not the YAML of a latent diffusion model: it lacks model.params with unet_config, "
            f"first_stage_config and cond_stage_config ({error})"
        ) from error
    _check_targets(path, targets)
    try:
        _check(found)
        found.unet_config(), found.autoencoder_config()
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidInputError(f"{path} does not describe the whole architecture: {error}") from error
    return found


def _classes(path: Path, condition: Any) -> int | None:
    if condition == UNCONDITIONAL:
        return None
    kind = str(condition["target"]).rpartition(".")[2]
    if kind != "ClassEmbedder":
        raise InvalidInputError(
            f"{path} is of a model with the condition {kind}: those without a condition and with classes are "
            "imported; Stable Diffusion's files need no YAML"
        )
    classes = int(condition["params"].get("n_classes", 1000))
    if classes != NULL_CLASS + 1:
        raise InvalidInputError(
            f"{path} has {classes} classes: DiTPipeline, which samples it, takes {NULL_CLASS + 1}, the last of "
            "them the null class"
        )
    return classes


def _check_targets(path: Path, targets: list[str]) -> None:
    for target, known in zip(
        targets,
        (("LatentDiffusion",), ("UNetModel",), ("VQModelInterface", "VQModel", "AutoencoderKL")),
        strict=True,
    ):
        if target not in known:
            raise InvalidInputError(
                f"{path} is of another architecture: {target} stands where {' or '.join(known)} is imported"
            )


def _check(found: LatentDiffusionConfig) -> None:
    unet, stage, path = found.unet, found.first_stage, found.path
    for name, value in _ONLY.items():
        if unet.get(name, value) != value:
            raise InvalidInputError(f"{path} has a U-Net with {name}: {unet[name]}, which is not imported")
    if bool(unet.get("use_spatial_transformer")) != (found.classes is not None):
        raise InvalidInputError(
            f"{path} has spatial transformers and no classes, or the reverse: not imported"
        )
    if found.classes is not None and (unet.get("resblock_updown") or not found.levels[-1].attends):
        raise InvalidInputError(
            f"{path} has classes with resblock_updown, or without attention at its lowest resolution: not imported"
        )
    if found.params.get("conditioning_key") not in (None, "crossattn"):
        raise InvalidInputError(f"{path} conditions by {found.params['conditioning_key']}: not imported")
    schedule, kind = found.params.get("beta_schedule", "linear"), found.params.get("parameterization", "eps")
    if schedule != "linear" or kind not in ("eps", "x0"):
        raise InvalidInputError(f"{path} has the schedule {schedule} and predicts {kind}: not imported")
    if not found.quantized and stage["embed_dim"] != stage["ddconfig"]["z_channels"]:
        raise InvalidInputError(
            f"{path} has an autoencoder whose embed_dim is not its z_channels: not imported"
        )
    if unet["in_channels"] != stage["embed_dim"]:
        raise InvalidInputError(
            f"{path} has a U-Net of other channels than its autoencoder's latents: not imported"
        )
