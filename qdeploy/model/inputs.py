"""The inputs of a denoiser: flat names for tensors, calls with them, and examples.

A denoiser's inputs are called by the parameters of its ``forward``; tensors in dictionaries are
``parameter.key``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdeploy.model.folder import Model, read_json
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor, nn

NUMBERS_AT_ONCE = 2**16  # of samples: four latents of 64 by 64 pixels


def flatten_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one ``forward`` call by parameter name; those in dictionaries as ``name.key``."""
    import torch

    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items() if isinstance(item, torch.Tensor)}
        elif name == "timestep":
            flat[name] = torch.as_tensor(value)
    return flat


def nest_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Undo the dotted names of `flatten_inputs`."""
    nested: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def denoise(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The network's prediction for inputs named as in `flatten_inputs`."""
    output: Tensor = denoiser(**nest_inputs(inputs), return_dict=False)[0]
    return output


def rows_at_once(sample: Tensor) -> int:
    """How many rows a network is given at once where nothing but memory decides.

    What a network computes on its way is hundreds of times as large as its sample; at the size of large models more
    rows at once take gigabytes, and no less time.

    Args:
        sample: the noisy sample, ``[rows, ...]``.
    """
    return max(1, NUMBERS_AT_ONCE // max(1, sample[:1].numel()))


def denoise_rows(denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """`denoise` for any number of rows, a few at a time; every input has rows."""
    import torch

    rows = rows_at_once(inputs[sample_name(denoiser)])
    parts = zip(*(value.split(rows) for value in inputs.values()), strict=True)
    return torch.cat([denoise(denoiser, dict(zip(inputs, part, strict=True))) for part in parts])


def example_inputs(model: Model, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the shapes that a denoiser's configuration and signature ask for.

    Raises:
        InvalidInputError: its configuration does not tell.
    """
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    size = config.get("sample_size")
    channels = config.get("in_channels")
    if not isinstance(size, int) or not isinstance(channels, int):
        raise InvalidInputError(
            f"{model.folder} does not say its sample size: pass a calibration set, whose inputs fit"
        )
    names = list(inspect.signature(model.denoiser_class().forward).parameters)
    steps = torch.linspace(1, 999, rows).round().long()
    inputs = {names[1]: noise(channels, size, size), "timestep": steps}
    width = config.get("cross_attention_dim") or config.get("caption_channels")
    if "encoder_hidden_states" in names and isinstance(width, int):
        inputs["encoder_hidden_states"] = noise(_prompt_tokens(model), width)
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if "class_labels" in names and classes and not config.get("caption_channels"):
        inputs["class_labels"] = torch.arange(rows) % 10
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs.text_embeds"] = noise(pooled)
        inputs["added_cond_kwargs.time_ids"] = torch.full((rows, 6), float(size))
    return inputs


def _prompt_tokens(model: Model) -> int:
    """How many tokens the pipeline's text encoder reads; CLIP's 77 if it does not say."""
    config = model.path / "text_encoder" / "config.json"
    return int(read_json(config).get("max_position_embeddings", 77)) if config.is_file() else 77


def sample_name(denoiser: nn.Module) -> str:
    """Name of the input that holds the noisy sample: the first parameter of ``forward``."""
    return next(iter(inspect.signature(denoiser.forward).parameters))
