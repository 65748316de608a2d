"""The pipeline in which an engine, a checkpoint or a model samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from qdeploy.model.folder import Model, open_if_there
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.origin import find_source_model
from qdeploy.model.pipeline_index import read_index
from qdeploy.model.sampling import Sampling
from qdeploy.model.schedulers import scheduler_for
from qdeploy.sampling.correct import correct
from qdeploy.sampling.pipeline_folder import is_pipeline_folder, load_pipeline, quiet_loading
from qdeploy.store.artifact import INDEX, Checkpoint, EngineFolder
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.timesteps import explain_schedule
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

Source = EngineFolder | Checkpoint | None  # what makes the images; None for a full-precision model


def pipeline_of(source: EngineFolder | Checkpoint, model: ModelSource | None) -> Model:
    """The folder whose pipeline a source runs in.

    Raises:
        InvalidInputError: there is no such folder.
    """
    if model is not None:
        return model_of(model)
    if is_pipeline_folder(source):
        return Model(source.path, source.component)
    found = find_source_model(source)
    if found is not None and found.has_pipeline:
        return found
    noted = source.source
    if open_if_there(noted) is not None:
        say(f"{noted} has changed since {source.path} was made from it, and is not used", level=2)
    if _is_denoiser_and_scheduler(source):
        return Model(source.path, source.component)
    raise InvalidInputError(
        f"the pipeline that {source.path} was made from is no longer at {noted or 'a known path'}: "
        "name its folder with --model"
    )


def _is_denoiser_and_scheduler(artifact: EngineFolder | Checkpoint) -> bool:
    """Whether an artifact holds all that its pipeline needs."""
    index = read_index(artifact.path) if artifact.is_pipeline else None
    if index is None:
        return False
    return all(
        name == "scheduler" and artifact.find("scheduler/scheduler_config.json")
        for name in index.others(artifact.component)
    )


def open_pipeline(source: Source, whole: Model, sampling: Sampling, correction: str, device: str) -> Any:
    """The pipeline with the source as its denoiser, all of it on a device."""
    if source is not None and whole.path == source.path and is_pipeline_folder(source):
        checker = {"safety_checker": None} if "safety_checker" in read_json_object(whole.path / INDEX) else {}
        pipeline = load_pipeline(source, **checker)
    else:
        with quiet_loading():
            pipeline = whole.pipeline(_denoiser(source, device))
    pipeline.scheduler = scheduler_for(sampling, pipeline.scheduler)
    # Schedules that are shifted by the size of the image are not known before the pipeline runs.
    shifted = pipeline.scheduler.config.get("use_dynamic_shifting", False)
    if source is not None and not shifted:
        asked = scheduler_for(
            replace(sampling, scheduler=type(pipeline.scheduler).__name__), pipeline.scheduler
        )
        asked.set_timesteps(sampling.steps)
        if line := explain_schedule(source.facts, torch.as_tensor(asked.timesteps).tolist()):
            say(line)
    if correction != "none":
        denoiser = getattr(pipeline, whole.component)
        with quiet_loading():
            corrected = correct(denoiser, correction, source, pipeline.scheduler)
            setattr(pipeline, whole.component, corrected)
    return pipeline if device == "cpu" else pipeline.to(device)


def _denoiser(source: Source, device: str) -> nn.Module | None:
    if source is None:
        return None
    if isinstance(source, EngineFolder):
        from qdeploy.engines.build import load_engine

        return cast(nn.Module, load_engine(source).as_denoiser())
    from qdeploy.quant.checkpoint import load_checkpoint

    return load_checkpoint(source, device)
