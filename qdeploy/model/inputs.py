"""The inputs of a denoiser: calls with them, and examples. Their names are those of `qdeploy.model.call`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdeploy.model.call import CallForm, plain_arguments, read_call, signature_of
from qdeploy.model.folder import Model, read_json
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor, nn

NUMBERS_AT_ONCE = 2**16  # of samples: four latents of 64 by 64 pixels


def flatten_inputs(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of one ``forward`` call by flat name; see `qdeploy.model.call`."""
    return read_call(signature_of(denoiser), args, kwargs)[1]


def attach_form(denoiser: nn.Module, form: CallForm | None) -> None:
    """Say how a network is called, for `denoise`; None for calls that are plain."""
    denoiser.__dict__["_call_form"] = form


def form_of(denoiser: nn.Module) -> CallForm | None:
    """How a network is called; None if its calls are plain."""
    found: CallForm | None = denoiser.__dict__.get("_call_form")
    return found


def denoise(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The network's prediction for inputs by flat name, and the constants that `attach_form` gave it."""
    form, parameters = form_of(denoiser), signature_of(denoiser).parameters
    if form is None:
        arguments = plain_arguments(inputs)
    else:
        arguments = form.build(inputs, inputs[sample_name(denoiser)].shape[0])
    if "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments["return_dict"] = False
    output = denoiser(**arguments)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    prediction: Tensor = output[0] if isinstance(output, tuple | list) else output
    return prediction


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
            f"{model.folder} does not say its sample size: pass a calibration set, whose inputs fit; the smallest is "
            f"made by `qdeploy collect {model.path} -o set --samples 1 --steps 4 --keep 2`"
        )
    names = list(inspect.signature(model.denoiser_class().forward).parameters)
    steps = torch.linspace(1, 999, rows).round().long()
    inputs = {names[1]: noise(channels, size, size), "timestep": steps}
    width = config.get("caption_channels") or config.get("cross_attention_dim")
    if "encoder_hidden_states" in names and isinstance(width, int):
        inputs["encoder_hidden_states"] = noise(_prompt_tokens(model), width)
    tables = [config.get(name) for name in ("num_class_embeds", "num_embeds_ada_norm", "num_classes")]
    if "class_labels" in names and config.get("class_embed_type") == "projection":
        inputs["class_labels"] = noise(config["projection_class_embeddings_input_dim"])
    elif "class_labels" in names and any(tables) and not config.get("caption_channels"):
        inputs["class_labels"] = torch.arange(rows) % min([10, *filter(None, tables)])
    if "timestep_cond" in names and config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = noise(config["time_cond_proj_dim"])
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
    return next(iter(signature_of(denoiser).parameters))
