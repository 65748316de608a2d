"""A pipeline folder: engines of all networks, tokenizers and scheduler; opened as a stock diffusers pipeline.

`build_engine` makes one from a bundle that holds a whole pipeline. It needs neither the original model nor torch's
weights nor a network. Components without a way to an engine lie in it as they are, and run in torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdeploy.engines.build import load_engine
from qdeploy.engines.drop_in.autoencoder import EngineAutoencoder
from qdeploy.engines.drop_in.model_stand_in import ModelStandIn
from qdeploy.engines.int8_decoder import W8A8
from qdeploy.engines.registry import find_backend
from qdeploy.model.folder import read_json
from qdeploy.store.artifact import INDEX, Artifact, EngineFolder, open_artifact
from qdeploy.store.hub import local_artifact
from qdeploy.system.errors import InvalidInputError

_DECODER, _ENCODER = "_decoder", "_encoder"


def load_pipeline(path: str | Path | Artifact, *, threads: int | None = None, **components: Any) -> Any:
    """The stock diffusers pipeline of a pipeline folder; its files are verified first.

    Args:
        path: the folder of an engine that is a whole pipeline, or its id on the Hub.
        threads: number of threads of every engine; that of the build if None.
        components: in place of the folder's, by name, such as ``safety_checker=None``.

    Returns:
        An instance of the pipeline class that the model was published with. It may be moved and cast; what its
        engines compute in stays.

    Raises:
        InvalidInputError: it is no engine, damaged, or the denoiser alone.
        CapabilityError: its runtime is not installed, or this machine cannot run it.
    """
    import diffusers
    import torch

    artifact = open_artifact(local_artifact(path), EngineFolder)
    if missing := missing_components(artifact):
        raise InvalidInputError(
            f"{artifact.path} holds no {' and no '.join(missing)}: export the whole pipeline and build it again, or "
            "put the engine into the model's own pipeline"
        )
    denoiser = load_engine(artifact, threads=threads).as_denoiser()
    engines = {artifact.component: denoiser, **_engines(artifact, threads)}
    # Diffusers takes no text encoders but those of transformers' classes here, and any in an open pipeline.
    early = {name: part if isinstance(part, ModelStandIn) else None for name, part in engines.items()}
    diffusers.utils.logging.disable_progress_bar()
    try:
        with quiet_loading():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                artifact.path,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                **{**early, **components},
            )
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(f"diffusers cannot open the pipeline in {artifact.path}: {first}") from error
    # Some pipelines load a denoiser of their own although they are given one.
    pipeline.register_modules(**{**engines, **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_pipeline_folder(artifact: Artifact) -> bool:
    """Whether an engine's folder holds the engines of a whole pipeline."""
    return (
        isinstance(artifact, EngineFolder)
        and artifact.facts.pipeline is not None
        and not missing_components(artifact)
    )


def missing_components(artifact: EngineFolder) -> list[str]:
    """Components of an engine's pipeline that its folder does not hold."""
    if not (artifact.path / INDEX).is_file():
        return ["pipeline"]
    built = artifact.facts.pipeline.graphs if artifact.facts.pipeline else {}
    index = read_json(artifact.path / INDEX)
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list)
        and entry[-1] is not None
        and name not in (artifact.component, *built)
        # Bundles describe text encoders in the folders that their engines would go to.
        and {file.name for file in (artifact.path / name).glob("*")} <= {"config.json"}
    ]


def _engines(artifact: EngineFolder, threads: int | None) -> dict[str, Any]:
    """Stand-ins for text encoders and autoencoders, by name."""
    from qdeploy.engines.drop_in.text_encoder import EngineTextEncoder

    described = artifact.facts.pipeline
    if described is None:
        return {}
    backend = find_backend(artifact.facts.backend)
    assert backend.load_component is not None
    index = read_json(artifact.path / INDEX)
    threads = threads or artifact.facts.threads
    found: dict[str, Any] = {}
    for name, folders in described.graphs.items():
        precision = (described.precision or {})[name]
        if precision == W8A8:  # and what is not integer in it as in the denoiser
            precision = artifact.facts.engine_precision
        graphs = {
            folder: backend.load_component(artifact.path / folder, precision, threads) for folder in folders
        }
        decoder = graphs.get(name + _DECODER)
        if decoder is None:
            found[name] = EngineTextEncoder(artifact.path / name, str(index[name][-1]), graphs[name])
        else:
            config = json.loads((artifact.path / f"{name}{_DECODER}" / "config.json").read_text())
            found[name] = EngineAutoencoder(config, artifact.path, decoder, graphs.get(name + _ENCODER))
    return found


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Diffusers warns of components that are not of the classes in the index, as stand-ins are not."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
