"""Checkpoints: the self-contained result of a calibration.

    COMPONENT/config.json            the denoiser's configuration
    COMPONENT/layers.json            every quantized layer: path, input it shares, split, code shapes; and the
                                     multiplications of every layer and attention product
    COMPONENT/quantized.safetensors  integer weights and all scales (names: `qdeploy.quant.state`)
    COMPONENT/parameters.safetensors what stays in float
    COMPONENT/correction.safetensors mean errors by timestep, if measured (`qdeploy.store.correction_table`)
    model_index.json, scheduler/     where the model was a pipeline
    probe.safetensors                a few held-out inputs with full-precision and quantized outputs

The layout is written down, not rediscovered: loading runs no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.model.call import CallForm, read_call, signature_of
from qdeploy.model.folder import Model
from qdeploy.model.inputs import attach_form, denoise_rows
from qdeploy.model.pipeline_index import INDEX, files_of, read_index
from qdeploy.network.current_timestep import attach_current_timestep
from qdeploy.network.roles import Layer, Structure
from qdeploy.quant.attention import AttentionQuantizers, quantize_attention
from qdeploy.quant.insert import share_current_timestep, share_dynamic_group
from qdeploy.quant.layer import OF_LAYERS, QuantizedLayer, quantized_layers, replace_module
from qdeploy.quant.modes import full_precision
from qdeploy.quant.shared_inputs import share_quantizers
from qdeploy.quant.state import check_state, read_state, write_state
from qdeploy.recipe.formats import NONE, Format, parse_format
from qdeploy.recipe.recipe import Recipe
from qdeploy.store.artifact import Artifact, Checkpoint, DenoiserArtifact, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.hub import local_artifact
from qdeploy.store.layers import LayerEntry, LayersFile, read_layers
from qdeploy.store.names import contained
from qdeploy.store.probe import PROBE
from qdeploy.store.timesteps import check_timestep
from qdeploy.system.errors import InvalidInputError


def write_checkpoint(
    draft: Draft[Checkpoint],
    model: Model,
    denoiser: nn.Module,
    layers: list[Layer],
    attentions: list[str],
    structure: Structure | None = None,
    recipe: Recipe | None = None,
) -> None:
    """Put a calibrated denoiser into a draft; of its structure, what every layer costs is kept."""
    modules = quantized_layers(denoiser)
    described = [
        {
            "path": layer.path,
            "reads": layer.reads,
            "split": list(modules[layer.path].split),
            "float_input": modules[layer.path].formats[1] is None,
            "codes": [list(shape) for shape in modules[layer.path].part_shapes()],
            **_own_formats(modules[layer.path], recipe, layer.path),
        }
        for layer in layers
    ]
    folder = model.name
    draft.tensors(f"{folder}/quantized.safetensors", lambda: read_state(denoiser))
    draft.tensors(f"{folder}/parameters.safetensors", lambda: float_parameters(denoiser))
    costs: dict[str, Any] = {}
    if structure is not None:
        costs = {
            "macs": {layer.path: layer.macs for layer in structure.layers},
            "products": structure.products,
        }
    draft.json(f"{folder}/layers.json", {"layers": described, "attentions": attentions, **costs})
    draft.json(f"{folder}/config.json", model.config)
    copy_pipeline_files(draft, model.path)


def _own_formats(layer: QuantizedLayer, recipe: Recipe | None, path: str) -> dict[str, Any]:
    """The formats of a layer, where they are others than those of its recipe."""
    names = [NONE if each is None else each.name for each in layer.formats]
    asked = None if recipe is None else [NONE if each is None else each.name for each in recipe.formats(path)]
    differ = asked is not None and names[0] != asked[0]
    return {"formats": names} if differ else {}


def copy_pipeline_files(draft: Draft[Any], folder: Path) -> None:
    """Copy the description of a pipeline, without any weights."""
    if read_index(folder) is None:
        return
    draft.copy(contained(folder, INDEX), INDEX)
    for name, file in files_of(folder, "scheduler").items():
        if file.suffix == ".json" and name.count("/") == 1:
            draft.copy(file, name)


def write_probe(draft: Draft[Any], denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Record what the network gives for a few inputs, before and after quantization."""

    def compute() -> dict[str, Tensor]:
        probe = {f"input.{name}": tensor.cpu() for name, tensor in inputs.items()}
        with torch.no_grad():
            if quantized_layers(denoiser):
                probe["simulated"] = denoise_rows(denoiser, inputs).cpu()
            with full_precision(denoiser):
                probe["reference"] = denoise_rows(denoiser, inputs).cpu()
        return probe

    return draft.tensors(PROBE, compute)


def load_checkpoint(checkpoint: str | Path | Artifact, device: str = "cpu") -> nn.Module:
    """The fake-quantized denoiser of a checkpoint.

    Raises:
        InvalidInputError: it is no checkpoint, or damaged.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_artifact(local_artifact(checkpoint), Checkpoint)
    artifact = checkpoint
    recipe = Recipe.from_json(artifact.recipe or {})
    denoiser = checkpoint_model(artifact).build().float()
    described = read_layers(artifact.layers)
    try:
        _quantize_as_described(denoiser, described, recipe)
    except (AttributeError, AssertionError, TypeError) as error:  # a path that the network does not have
        raise InvalidInputError(
            f"{artifact.path} does not fit its config.json: its layers.json describes other layers ({error})"
        ) from error
    from safetensors.torch import load_file

    parameters = load_file(artifact.parameters)
    missing, unexpected = denoiser.load_state_dict(parameters, strict=False, assign=True)
    left = [name for name in missing if not _is_quantizer_state(name)]
    if left or unexpected:
        raise InvalidInputError(
            f"{artifact.path} does not fit its config.json, first at {[*left, *unexpected][0]}"
        )
    shapes = {
        f"{layer.path}.weight.{part}": shape
        for layer in described.layers
        for part, shape in enumerate(layer.codes)
    }
    state = load_file(artifact.quantized)
    check_state(state, str(artifact.path))
    write_state(denoiser, state, shapes)
    facts, where = artifact.facts, str(artifact.path)
    attach_current_timestep(denoiser).check = lambda timestep: check_timestep(
        facts.timesteps, facts.time_table, timestep, where
    )
    guard_form(denoiser, CallForm.of(facts.call), where)
    return denoiser.to(device).eval().requires_grad_(False)


def guard_form(denoiser: nn.Module, form: CallForm | None, where: str) -> None:
    """Let a network be called as it was calibrated alone: with the same constants (see `qdeploy.model.call`).

    Args:
        denoiser: the network.
        form: how it was called; None for calls that are plain.
        where: the artifact, for messages.
    """
    if form is None:
        return
    signature = signature_of(denoiser)
    attach_form(denoiser, form)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_exporting():
            return
        found, tensors = read_call(signature, args, kwargs)
        if difference := form.difference(found, len(tensors[next(iter(signature.parameters))])):
            raise InvalidInputError(f"{where} was calibrated for other calls than one with {difference}")

    denoiser.register_forward_pre_hook(before, with_kwargs=True)


def checkpoint_model(artifact: DenoiserArtifact) -> Model:
    """The model whose configuration a checkpoint holds; it has no weights of its own to load."""
    return Model(artifact.path, artifact.component)


def _quantize_as_described(denoiser: nn.Module, described: LayersFile, recipe: Recipe) -> None:
    for layer in described.layers:
        inner = denoiser.get_submodule(layer.path)
        weights, own = formats_as_described(layer, recipe)
        seen = None if layer.float_input else own
        replace_module(denoiser, layer.path, QuantizedLayer(inner, weights, seen, layer.split))
        inner.weight = None  # type: ignore[assignment]
    share_quantizers(denoiser, {layer.path: layer.reads for layer in described.layers})
    share_dynamic_group(denoiser, recipe)
    for path in described.attentions:
        assert recipe.attention is not None
        quantize_attention(
            denoiser.get_submodule(path), AttentionQuantizers(recipe.attention, recipe.probabilities)
        )
    share_current_timestep(denoiser)


def formats_as_described(layer: LayerEntry, recipe: Recipe) -> tuple[Format | None, Format | None]:
    """The formats of a layer's weight and input, from its entry in ``layers.json``."""
    if layer.formats is None:
        return recipe.formats(layer.path)
    weights, activations = map(parse_format, layer.formats)
    return weights, activations


def float_parameters(denoiser: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps in float: everything but quantized weights and quantizers."""
    quantized = {f"{path}.inner.weight" for path in quantized_layers(denoiser)}
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in denoiser.state_dict().items()
        if name not in quantized and not _is_quantizer_state(name)
    }


def _is_quantizer_state(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in OF_LAYERS or any(part.endswith("_quantizers") or part == "table" for part in parts)
