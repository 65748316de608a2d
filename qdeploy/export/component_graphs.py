"""Text encoders and autoencoders as functions of plain tensors, ready to be traced.

Names of folders, inputs and outputs are those that optimum's ``ORTDiffusionPipeline`` and OpenVINO's pipelines
expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.pipeline_index import Component, files_of
from qdeploy.model.weights import DIFFUSERS, TRANSFORMERS, find_weights
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.names import contained
from qdeploy.system.errors import InvalidInputError

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
T5 = ("T5EncoderModel",)
AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC")


@dataclass(frozen=True)
class Part:
    """One graph of a component other than the denoiser.

    Attributes:
        folder: its folder in the bundle.
        module: what it computes, from plain tensors to a tuple of tensors.
        inputs: example inputs by name; axis 0 is dynamic.
        outputs: names of the outputs.
        config: the component's configuration.
        axes: further dynamic axes of all inputs, with their names.
    """

    folder: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    config: dict[str, Any]
    axes: dict[int, str] = field(default_factory=dict)


def has_graphs(class_name: str) -> bool:
    """Whether components of this class become graphs."""
    return class_name in (*CLIP, *T5, *AUTOENCODERS)


def parts(name: str, component: Component) -> Iterator[Part]:
    """The graphs of one component: one of a text encoder, decoder and encoder of an autoencoder.

    Args:
        name: of the component.
        component: of a class for which `has_graphs`.

    Raises:
        InvalidInputError: its weights cannot be loaded.
    """
    loaded, class_name = _load(component), component.class_name
    config = read_json_object(contained(component.folder, "config.json"))
    if class_name in CLIP:
        yield _clip(name, loaded, config, (component.folder.parent / "text_encoder_2").is_dir())
    elif class_name in T5:
        inputs = {"input_ids": torch.ones(2, 12, dtype=torch.int64)}
        inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
        module = _TextEncoder(loaded, ("last_hidden_state",))
        yield Part(name, module, inputs, ("last_hidden_state",), config, {1: "sequence"})
    else:
        # Height and width differ, else the tracer would take them for one number.
        shape = (_config(loaded, "latent_channels"), 8, 12)
        latent = {"latent_sample": torch.randn(2, *shape)}
        axes = {2: "latent_height", 3: "latent_width"}
        yield Part(f"{name}_decoder", _Decoder(loaded), latent, ("sample",), config, axes)
        factor = 2 ** max(len(config.get("block_out_channels") or ()) - 1, 2)
        image = {"sample": torch.randn(2, _config(loaded, "in_channels"), 8 * factor, 12 * factor)}
        distribution = class_name == "AutoencoderKL"
        output = "latent_parameters" if distribution else "latent_sample"
        encoder = _Encoder(loaded, distribution)
        yield Part(f"{name}_encoder", encoder, image, (output,), config, {2: "height", 3: "width"})


def _config(loaded: Any, name: str) -> int:
    return int(loaded.config[name])


def _load(component: Component) -> Any:
    found, folder = component.find_class(), component.folder
    files_of(folder.parent, folder.name)  # nothing outside of it is read
    try:
        base = TRANSFORMERS if component.library == "transformers" else DIFFUSERS
        variant = find_weights(folder, base=base).variant
        loaded = found.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            torch_dtype=torch.float32,
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(f"the component {folder} cannot be loaded: {first}") from error
    return loaded.float().eval().requires_grad_(False)


def _clip(name: str, encoder: Any, config: dict[str, Any], several: bool) -> Part:
    """The graph of a CLIP text encoder. Pipelines with several of them read hidden states of each."""
    length = int(getattr(encoder.config, "max_position_embeddings", 77))
    ids = torch.zeros(2, length, dtype=torch.int64)
    projected = type(encoder).__name__.endswith("WithProjection")
    layers = encoder.config.num_hidden_layers + 1 if projected or several else 0
    plain = ("text_embeds", "last_hidden_state") if projected else ("last_hidden_state", "pooler_output")
    outputs = (*plain, *(f"hidden_states.{layer}" for layer in range(layers)))
    return Part(name, _TextEncoder(encoder, outputs), {"input_ids": ids}, outputs, config)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.outputs = encoder, outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = any(name.startswith("hidden_states") for name in self.outputs)
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        result = self.encoder(input_ids=input_ids, output_hidden_states=hidden, return_dict=True, **mask)
        plain = [result[name] for name in self.outputs if not name.startswith("hidden_states")]
        return (*plain, *(result.hidden_states if hidden else ()))


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


class _Encoder(nn.Module):
    def __init__(self, vae: Any, distribution: bool) -> None:
        super().__init__()
        self.vae, self.distribution = vae, distribution

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        encoded = self.vae.encode(sample, return_dict=False)[0]
        return (encoded.parameters if self.distribution else encoded,)
