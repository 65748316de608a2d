"""Latent diffusion as its authors name it: an independent, minimal implementation, the oracle of `qdeploy import`.

Modules bear the names of the original code, so that ``state_dict`` has the keys of its checkpoints; what they compute
is written from the papers' architecture and shares nothing with diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn


def norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    def __init__(self, c: int, emb: int, out: int, scale_shift: bool, resize: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            norm(out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c == out else nn.Conv2d(c, out, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize == "down" else x

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.resized(x)) + h


class AttentionBlock(nn.Module):
    """Queries, keys and values of one head lie together: head, then q/k/v, then channel."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj_out = norm(c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).unbind(2)
        weight = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(q.shape[2]), dim=-1)
        out = torch.einsum("bhts,bhcs->bhct", weight, v).flatten(1, 2)
        return (flat + self.proj_out(out)).reshape(x.shape)


class CrossAttention(nn.Module):
    def __init__(self, c: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k = nn.Linear(c, c, bias=False), nn.Linear(context, c, bias=False)
        self.to_v, self.to_out = nn.Linear(context, c, bias=False), nn.Sequential(nn.Linear(c, c))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = torch.softmax(torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1]), dim=-1)
        return self.to_out(torch.einsum("bhts,bshc->bthc", weight, v).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(c, 4 * c), nn.Dropout(0), nn.Linear(4 * c, c))


class BasicTransformerBlock(nn.Module):
    def __init__(self, c: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(c, c, heads), CrossAttention(c, context, heads)
        self.ff = FeedForward(c)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, c: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = norm(c, 1e-6), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(c, context, heads)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Plain(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class UNetModel(nn.Module):
    """As the original builds it from the same words of its YAML."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        attention_resolutions: Sequence[int],
        num_res_blocks: int,
        channel_mult: Sequence[int],
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_spatial_transformer: bool = False,
        context_dim: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        ch, emb = model_channels, 4 * model_channels
        self.width, shift = ch, use_scale_shift_norm

        def attention(c: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else c // num_head_channels
            return (
                SpatialTransformer(c, context_dim, heads)
                if use_spatial_transformer
                else AttentionBlock(c, heads)
            )

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        blocks = [nn.ModuleList([Plain(in_channels, ch, 3, padding=1)])]
        kept, last = [ch], len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [ResBlock(ch, emb, mult * model_channels, shift)]
                ch = mult * model_channels
                layers += [attention(ch)] if 2**level in attention_resolutions else []
                blocks.append(nn.ModuleList(layers))
                kept.append(ch)
            if level != last:
                down = ResBlock(ch, emb, ch, shift, "down") if resblock_updown else Downsample(ch)
                blocks.append(nn.ModuleList([down]))
                kept.append(ch)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [ResBlock(ch, emb, ch, shift), attention(ch), ResBlock(ch, emb, ch, shift)]
        )
        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for number in range(num_res_blocks + 1):
                layers = [ResBlock(ch + kept.pop(), emb, mult * model_channels, shift)]
                ch = mult * model_channels
                layers += [attention(ch)] if 2**level in attention_resolutions else []
                if level and number == num_res_blocks:
                    layers.append(ResBlock(ch, emb, ch, shift, "up") if resblock_updown else Upsample(ch))
                blocks.append(nn.ModuleList(layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(norm(ch), nn.SiLU(), nn.Conv2d(model_channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.width // 2
        angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb, context)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, emb, context)
        return self.out(x)


class ResnetBlock(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c, 1e-6), nn.Conv2d(c, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out, 1e-6), nn.Conv2d(out, out, 3, padding=1)
        if c != out:
            self.nin_shortcut = nn.Conv2d(c, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = norm(c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), dim=-1)
        return x + self.proj_out(torch.einsum("bts,bcs->bct", weight, v).reshape(x.shape))


class Sampler(nn.Module):
    """What the original calls ``downsample`` or ``upsample``: a convolution named ``conv``."""

    def __init__(self, c: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(c, c, 3, stride=2) if down else nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(
            F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2, mode="nearest")
        )


class Half(nn.Module):
    """Encoder or decoder; its words are those of ``ddconfig``."""

    def __init__(self, decoder: bool, ddconfig: dict[str, Any]) -> None:
        super().__init__()
        ch, mults, count = ddconfig["ch"], ddconfig["ch_mult"], ddconfig["num_res_blocks"]
        resolution = ddconfig["resolution"]
        self.decoder = decoder
        latent = ddconfig["z_channels"] * (2 if ddconfig["double_z"] and not decoder else 1)
        first = ch * mults[-1] if decoder else ch
        self.conv_in = nn.Conv2d(latent if decoder else ddconfig["in_channels"], first, 3, padding=1)
        levels: dict[int, nn.Module] = {}
        width = first
        for level in reversed(range(len(mults))) if decoder else range(len(mults)):
            module = nn.Module()
            module.block, module.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(count + decoder):
                module.block.append(ResnetBlock(width, ch * mults[level]))
                width = ch * mults[level]
                if resolution // 2**level in ddconfig["attn_resolutions"]:
                    module.attn.append(AttnBlock(width))
            if level != (0 if decoder else len(mults) - 1):
                setattr(module, "upsample" if decoder else "downsample", Sampler(width, not decoder))
            levels[level] = module
        setattr(self, "up" if decoder else "down", nn.ModuleList([levels[level] for level in sorted(levels)]))
        middle = first if decoder else width
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = ResnetBlock(middle, middle), AttnBlock(middle)
        self.mid.block_2 = ResnetBlock(middle, middle)
        self.norm_out = norm(width, 1e-6)
        self.conv_out = nn.Conv2d(width, ddconfig["out_ch"] if decoder else latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.decoder:
            x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up) if self.decoder else self.down:
            for number, block in enumerate(level.block):
                x = block(x)
                x = level.attn[number](x) if len(level.attn) else x
            for name in ("downsample", "upsample"):
                x = getattr(level, name)(x) if hasattr(level, name) else x
        if not self.decoder:
            x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)

    def forward(self, z: Tensor) -> Tensor:
        flat = z.permute(0, 2, 3, 1)
        nearest = (flat[..., None, :] - self.embedding.weight).square().sum(-1).argmin(-1)
        return self.embedding(nearest).permute(0, 3, 1, 2)


class FirstStage(nn.Module):
    """VQModelInterface where it has a codebook, AutoencoderKL where not."""

    def __init__(self, embed_dim: int, ddconfig: dict[str, Any], n_embed: int = 0, **unused: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = Half(False, ddconfig), Half(True, ddconfig)
        double, z = 2 if ddconfig["double_z"] else 1, ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(double * z, double * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)
        if n_embed:
            self.quantize = Codebook(n_embed, embed_dim)

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(z) if hasattr(self, "quantize") else z))


class ClassEmbedder(nn.Module):
    def __init__(self, n_classes: int, embed_dim: int, **unused: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)


class LatentDiffusion(nn.Module):
    """The model of a YAML of the original, with random weights."""

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        params = config["model"]["params"]
        self.image_size, self.channels = params["image_size"], params["channels"]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Module()
            self.model.diffusion_model = UNetModel(**params["unet_config"]["params"])
            self.first_stage_model = FirstStage(**params["first_stage_config"]["params"])
            if params["cond_stage_config"] != "__is_unconditional__":
                self.cond_stage_model = ClassEmbedder(**params["cond_stage_config"]["params"])
            for parameter in self.parameters():  # norms too: nothing that is 0 or 1 hides a mistake
                parameter.data += 0.05 * torch.randn_like(parameter)
        steps, low, high = params["timesteps"], params["linear_start"], params["linear_end"]
        betas = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0).float())
        self.register_buffer("scale_factor", torch.tensor(0.75 if params.get("scale_by_std") else 1.0))

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int, label: int | None = None, scale: float = 1.0) -> Tensor:
        """DDIM without noise: images in [0, 1], in the layout batch, height, width, channel."""
        x, total = noise, len(self.alphas_cumprod)
        times = [1 + step * (total // steps) for step in range(steps)]

        def predict(x: Tensor, t: int, label: int | None) -> Tensor:
            labels = None if label is None else torch.full((len(x),), label)
            context = None if labels is None else self.cond_stage_model.embedding(labels)[:, None]
            return self.model.diffusion_model(x, torch.full((len(x),), t), context)

        for number in reversed(range(steps)):
            t = times[number]
            eps = predict(x, t, label)
            if scale != 1:
                without = predict(x, t, 1000)
                eps = without + scale * (eps - without)
            now = self.alphas_cumprod[t]
            before = self.alphas_cumprod[times[number - 1] if number else 0]
            clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
            x = before.sqrt() * clean + (1 - before).sqrt() * eps
        images = self.first_stage_model.decode(x / self.scale_factor)
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def save(self, folder: Path, averaged: bool = False) -> tuple[Path, Path]:
        """The checkpoint and the YAML. ``averaged``: the weights are the moving average's, beside others."""
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict())
        if averaged:
            for name in [name for name in state if name.startswith("model.")]:
                state["model_ema." + name.removeprefix("model.").replace(".", "")] = state[name]
                state[name] = state[name] + 1
            state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9), torch.tensor(5)
        torch.save({"epoch": 3, "state_dict": state}, folder / "model.ckpt")
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        return folder / "model.ckpt", folder / "config.yaml"


def config(
    unet: dict[str, Any], quantized: bool, classes: int | None = None, attn_resolutions: Sequence[int] = ()
) -> dict[str, Any]:
    """A YAML's content: a U-Net's words, and a tiny autoencoder that halves the size of images of 16 pixels."""
    z = 3 if quantized else 4
    ddconfig = {
        "double_z": not quantized,
        "z_channels": z,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": list(attn_resolutions),
        "dropout": 0.0,
    }
    autoencoder = {"embed_dim": z, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    if quantized:
        autoencoder["n_embed"] = 64
    condition: Any = "__is_unconditional__"
    if classes:
        condition = {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": classes, "embed_dim": unet["context_dim"], "key": "class_label"},
        }
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "first_stage_key": "image",
        "cond_stage_key": "class_label",
        "image_size": 8,
        "channels": z,
        "scale_by_std": not quantized,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": 8,
                "in_channels": z,
                "out_channels": z,
                "model_channels": 32,
                "num_res_blocks": 1,
                **unet,
            },
        },
        "first_stage_config": {
            "target": f"ldm.models.autoencoder.{'VQModelInterface' if quantized else 'AutoencoderKL'}",
            "params": autoencoder,
        },
        "cond_stage_config": condition,
    }
    if classes:
        params |= {"conditioning_key": "crossattn", "cond_stage_trainable": True}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


BEDROOMS = config(
    {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}, quantized=True
)
CHURCHES = config(
    {
        "attention_resolutions": [1, 2],
        "channel_mult": [1, 2],
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    quantized=False,
)
IMAGENET = config(
    {
        "attention_resolutions": [2, 4],
        "channel_mult": [1, 2, 2],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 16,
    },
    quantized=True,
    classes=1001,
    attn_resolutions=[8],
)
