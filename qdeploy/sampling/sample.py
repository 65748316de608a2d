"""The verb ``sample``: images of an engine, a checkpoint or a model, by its stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qdeploy.model.folder import Model, open_if_there
from qdeploy.model.in_memory import ModelSource, artifact_or_model, model_of
from qdeploy.model.media import IMAGES, Media
from qdeploy.model.origin import find_source_model
from qdeploy.model.pipeline import sample_images
from qdeploy.model.pipeline_index import pipeline_sha256, read_index
from qdeploy.model.sampling import SAMPLING, Sampling, SamplingOptions, renamed, sampled
from qdeploy.model.schedulers import scheduler_for
from qdeploy.model.timesteps import Timesteps
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.sampling.correct import check_correction, correct
from qdeploy.sampling.media_files import as_stored, file_of, write_media, write_npz
from qdeploy.sampling.pipeline_folder import is_pipeline_folder, load_pipeline, quiet_loading
from qdeploy.store.artifact import (
    INDEX,
    Artifact,
    Checkpoint,
    EngineFolder,
    Samples,
    is_artifact,
    open_artifact,
)
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.builder import Draft
from qdeploy.store.data_facts import SamplesFacts
from qdeploy.store.hub import is_on_hub, local_artifact
from qdeploy.store.manifest import Notes
from qdeploy.store.paths import default_output
from qdeploy.store.timesteps import explain_schedule
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.progress import say, track

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Source = EngineFolder | Checkpoint | None  # what makes the images; None for a full-precision model

_IMAGES = 16  # where there are no prompts to count


@sampled(SAMPLING)
def sample(
    source: ModelSource | Artifact,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    *,
    samples: int | None = None,
    model: ModelSource | None = None,
    correction: str = "none",
    npz: bool = False,
    overwrite: bool = False,
    **options: Unpack[SamplingOptions],
) -> Samples:
    """Make images. Image i has the seed ``seed + i``, in whatever batches they are made.

    Args:
        source: an engine, a checkpoint or a model, the last in a folder or in memory.
        output: folder of the images; in the working directory by default.
        sampling: how images are sampled; 50 steps of the model's own scheduler by default.
        samples: number of images; one for each prompt, or 16, by default.
        model: the pipeline in which an engine or checkpoint runs, in a folder or in memory; by default the engine's
            own where its folder is a whole pipeline, else the one that it was made from.
        correction: ``table`` or ``online`` to subtract mean errors from predictions, or ``none``; ``online:4,3``
            estimates at every fourth call, with a guard of three standard deviations.
        npz: also write ``images.npz`` with one array [N, H, W, C], as the evaluation suite of ADM reads it.
        overwrite: replace another artifact at ``output``.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        An artifact of kind ``samples``: ``00000.png`` and so on, each with its seed in a text chunk;
        ``images.safetensors`` with uint8 ``images`` ``[N, C, H, W]``; and ``grid.png``. Of videos ``00000.gif``, of
        sounds ``00000.wav``, of embeddings their tensors alone, as of `qdeploy.sampling.media_files`.

    Raises:
        UsageError: an impossible number, an unknown scheduler, missing prompts, no table of corrections.
        InvalidInputError: no pipeline for the source is found, or it cannot make such images; or the
            correction does not fit checkpoint or scheduler.
    """
    given: dict[str, Any] = dict(options)
    renamed(given, "count", "samples")
    samples = given.pop("samples", samples)
    chosen = (sampling or SAMPLING).changed(given)
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    if isinstance(source, str | Path) and not is_artifact(Path(source)) and is_on_hub(source):
        source = local_artifact(source)
    found = artifact_or_model(source)
    made: _Source = open_artifact(found, EngineFolder, Checkpoint) if isinstance(found, Path) else None
    check_correction(correction, made)
    whole = _pipeline_of(made, model) if made is not None else cast(Model, found)
    origin, identity = ("model", whole.sha256) if made is None else (made.kind, made.sha256)
    chosen = chosen if made is None else chosen.sized_like(made.facts.sampled)
    chosen = with_shipped_prompts(chosen, whole.path)
    if samples is None:
        samples = len(chosen.prompts) if chosen.prompts else _IMAGES
    prompts = None if chosen.prompts is None else list(chosen.prompts)
    asked: dict[str, Any] = {
        "count": samples,
        "steps": chosen.steps,
        "scheduler": chosen.scheduler,
        "prompts": prompts,
        "guidance": chosen.guidance,
        "eta": chosen.eta,
        "height": chosen.height,
        "width": chosen.width,
        **({"negative_prompts": list(chosen.negative_prompts)} if chosen.negative_prompts else {}),
        **({"arguments": dict(chosen.arguments)} if chosen.arguments else {}),
        **({"timesteps": _words(chosen.timesteps)} if chosen.timesteps else {}),
        **({} if correction == "none" else {"correction": correction}),
        **({"npz": True} if npz else {}),
    }
    place = Path(output) if output else default_output(whole.path if made is None else made.path, "samples")
    made_from = {origin: identity, "pipeline": pipeline_sha256(whole)}
    if chosen.folder is not None:
        chosen.folder.check(range(samples))
        made_from["inputs"] = chosen.folder.sha256
    draft = Draft(place, Samples, made_from, None, chosen.seed, asked, overwrite)
    if done := draft.finished():
        return done
    with draft:
        pipeline = cache(lambda: _open_pipeline(made, whole, chosen, correction))
        media = _make(pipeline, draft, chosen, samples)
        settings = {
            "steps": chosen.steps,
            "scheduler": type(pipeline().scheduler).__name__,
            origin: identity,
            **({} if correction == "none" else {"correction": correction}),
        }
        write_media(draft, media, chosen.seed, prompts, settings)
        if npz:
            write_npz(draft, media)
        kind = None if media.kind == IMAGES else media.kind
        facts = SamplesFacts(**asked | settings, shape=list(media.values.shape[1:]), media=kind)
        return draft.finish(facts, notes=Notes(pipeline=str(whole.path)))


def _make(pipeline: Callable[[], Any], draft: Draft[Samples], sampling: Sampling, samples: int) -> Media:
    """All of them, pictures as uint8; batches that an earlier run finished are not made again."""

    def make(numbers: Sequence[int]) -> dict[str, Tensor]:
        media = sample_images(pipeline(), sampling, numbers)
        if not bool(media.values.isfinite().all()):
            raise InvalidInputError(f"the {media.kind} hold NaN or Inf: does the scheduler fit the model?")
        return {media.kind: as_stored(media)}

    made = [
        draft.step(f"images-{sampling.seed + part[0]}-{len(part)}", partial(make, part))
        for part in track(sampling.batches(samples), "sampling")
    ]
    kind = next(iter(made[0]))
    stored = draft.tensors(file_of(kind), lambda: {kind: torch.cat([part[kind] for part in made])})
    return Media(kind, stored[kind])


# -- the pipeline ------------------------------------------------------------------------------------------


def _pipeline_of(source: EngineFolder | Checkpoint, model: ModelSource | None) -> Model:
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


def _words(timesteps: Timesteps) -> str:
    return timesteps if isinstance(timesteps, str) else ",".join(f"{t:g}" for t in timesteps)


def _open_pipeline(source: _Source, whole: Model, sampling: Sampling, correction: str) -> Any:
    if source is not None and whole.path == source.path and is_pipeline_folder(source):
        checker = {"safety_checker": None} if "safety_checker" in read_json_object(whole.path / INDEX) else {}
        pipeline = load_pipeline(source, **checker)
    else:
        with quiet_loading():
            pipeline = whole.pipeline(_denoiser(source))
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
    return pipeline


def _denoiser(source: _Source) -> nn.Module | None:
    if source is None:
        return None
    if isinstance(source, EngineFolder):
        from qdeploy.engines.build import load_engine

        return cast(nn.Module, load_engine(source).as_denoiser())
    from qdeploy.quant.checkpoint import load_checkpoint

    return load_checkpoint(source)
