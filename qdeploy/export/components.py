"""The rest of a text-to-image pipeline as ONNX, so that a bundle is a whole pipeline.

Text encoders and the autoencoder stay in float32. Names of folders, inputs and outputs are those that
optimum's ``ORTDiffusionPipeline`` expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.trace import export_program
from qdeploy.model.pipeline_index import Component, files_of, read_index
from qdeploy.model.requirements import require_libraries
from qdeploy.model.weights import DIFFUSERS, TRANSFORMERS, find_weights
from qdeploy.store.artifact import Bundle
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.builder import Draft
from qdeploy.store.names import contained
from qdeploy.system.errors import InvalidInputError

_COPIED = ("tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor")


@dataclass(frozen=True)
class Part:
    """One graph of a bundle besides the denoiser.

    Attributes:
        folder: its folder in the bundle.
        module: what it computes, from plain tensors to a tuple of tensors.
        inputs: example inputs by name; axis 0 is dynamic.
        outputs: names of the outputs.
        config: the component's configuration.
    """

    folder: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    config: dict[str, Any]


def has_components(path: Path) -> bool:
    """Whether a folder is a pipeline with more than a denoiser and a scheduler."""
    index = read_index(path)
    return index is not None and not {"vae", "text_encoder"}.isdisjoint(index.components)


def write_components(draft: Draft[Bundle], path: Path) -> None:
    """Export text encoders and autoencoder of the pipeline in ``path``, and copy its tokenizers.

    Raises:
        InvalidInputError: a component cannot be loaded or traced.
    """
    for part in _parts(path):
        graph = export_program(part.module, part.inputs, part.outputs)
        save(lower(graph, "portable"), draft.content / part.folder / "model.onnx")
        draft.json(f"{part.folder}/config.json", part.config)
    for folder in _COPIED:
        for name, file in files_of(path, folder).items():
            draft.copy(file, name)


def _parts(path: Path) -> Iterator[Part]:
    index = read_index(path)
    assert index is not None
    require_libraries(index)
    for name, component in index.components.items():
        if name.startswith("text_encoder"):
            yield _text_encoder(name, _load(component), component)
        elif name == "vae":
            vae = _load(component)
            config = read_json_object(contained(path, f"{name}/config.json"))
            latent = torch.randn(2, vae.config.latent_channels, 8, 8)
            image = torch.randn(2, vae.config.in_channels, 32, 32)
            yield Part("vae_decoder", _Decoder(vae), {"latent_sample": latent}, ("sample",), config)
            yield Part("vae_encoder", _Encoder(vae), {"sample": image}, ("latent_parameters",), config)


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


def _text_encoder(name: str, encoder: Any, component: Component) -> Part:
    length = int(getattr(encoder.config, "max_position_embeddings", 77))
    ids = torch.zeros(2, length, dtype=torch.int64)
    projected = type(encoder).__name__.endswith("WithProjection")
    layers = encoder.config.num_hidden_layers + 1 if projected else 0
    plain = ("text_embeds", "last_hidden_state") if projected else ("last_hidden_state", "pooler_output")
    outputs = (*plain, *(f"hidden_states.{layer}" for layer in range(layers)))
    config = read_json_object(contained(component.folder, "config.json"))
    return Part(name, _TextEncoder(encoder, outputs), {"input_ids": ids}, outputs, config)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.outputs = encoder, outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = any(name.startswith("hidden_states") for name in self.outputs)
        result = self.encoder(input_ids=input_ids, output_hidden_states=hidden, return_dict=True)
        plain = [result[name] for name in self.outputs if not name.startswith("hidden_states")]
        return (*plain, *(result.hidden_states if hidden else ()))


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


class _Encoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(sample, return_dict=False)[0].parameters,)
