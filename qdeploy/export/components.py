"""The other components of a pipeline in a bundle: graphs where they can be exported, copies where not.

Text encoders and autoencoders become graphs in float32, with any number of rows and any size. Tokenizers and what
else holds no weights is copied. A component with weights and without a way to a graph, such as a safety checker or
an image encoder, is copied with its weights, and runs in torch wherever the pipeline does.
"""

from __future__ import annotations

from pathlib import Path

from qdeploy.export.component_graphs import Part, has_graphs, parts
from qdeploy.export.graph import save
from qdeploy.export.lower import lower
from qdeploy.export.tokenizer_files import write_older_files
from qdeploy.export.trace import export_program
from qdeploy.model.folder import COMPONENTS
from qdeploy.model.pipeline_index import Component, files_of, read_index
from qdeploy.model.requirements import require_libraries
from qdeploy.model.weights import DIFFUSERS, TRANSFORMERS, find_weights
from qdeploy.store.artifact import Bundle
from qdeploy.store.builder import Draft
from qdeploy.store.facts import PipelineFacts
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data")


def rest_of_pipeline(path: Path) -> dict[str, Component]:
    """A pipeline's components by name, but for denoisers and the scheduler."""
    index = read_index(path)
    if index is None:
        return {}
    return {
        name: component
        for name, component in index.components.items()
        if name not in (*COMPONENTS, "scheduler") and component.folder.is_dir()
    }


def has_components(path: Path) -> bool:
    """Whether a folder is a pipeline with more than a denoiser and a scheduler."""
    return bool(rest_of_pipeline(path))


def write_components(draft: Draft[Bundle], path: Path) -> PipelineFacts:
    """Export the components of the pipeline in ``path`` but for its denoiser, or copy them.

    Raises:
        InvalidInputError: a component's weights cannot be loaded, or are no safetensors.
    """
    graphs: dict[str, list[str]] = {}
    kept: dict[str, str] = {}
    index = read_index(path)
    if index is not None:
        require_libraries(index)
    for name, component in rest_of_pipeline(path).items():
        reason = f"there is no way from a {component.class_name} to a graph"
        if has_graphs(component.class_name):
            try:
                graphs[name] = [_write(draft, part) for part in parts(name, component)]
                continue
            except _Untraceable as error:
                reason = str(error)
        if _copy(draft, path, name):
            kept[name] = reason
            say(f"{name} stays in torch: {reason}")
        elif name.startswith("tokenizer"):
            write_older_files(draft, name)
    return PipelineFacts(graphs=graphs, torch=kept)


class _Untraceable(Exception):
    """A component that the tracer cannot follow."""


def _write(draft: Draft[Bundle], part: Part) -> str:
    try:
        graph = export_program(part.module, part.inputs, part.outputs, dict.fromkeys(part.inputs, part.axes))
    except InvalidInputError as error:
        raise _Untraceable(str(error)) from error
    save(lower(graph, "portable"), draft.content / part.folder / "model.onnx")
    draft.json(f"{part.folder}/config.json", part.config)
    return part.folder


def _copy(draft: Draft[Bundle], path: Path, name: str) -> bool:
    """Copy a component's folder; whether it holds weights.

    Raises:
        InvalidInputError: the weights are no safetensors.
    """
    listed = files_of(path, name)
    files = list(listed.values())
    weights: list[Path] = []
    if any(file.suffix in _WEIGHTS for file in files):
        base = TRANSFORMERS if list((path / name).glob(f"{TRANSFORMERS}*.safetensors*")) else DIFFUSERS
        found = find_weights(path / name, base=base)
        if found.variant is not None:
            raise InvalidInputError(
                f"the component {path / name} has weights of the variant {found.variant} alone: save the pipeline "
                "without a variant, or export with --no-pipeline"
            )
        weights = list(found.files)
    for place, file in listed.items():
        if file.suffix not in _WEIGHTS or file in weights:
            draft.copy(file, place)
    return bool(weights)
