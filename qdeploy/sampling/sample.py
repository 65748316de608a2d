"""The verb ``sample``: images of an engine, a checkpoint or a model, by its stock diffusers pipeline."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from qdeploy.model.folder import INDEX, Model, open_if_there, open_model
from qdeploy.model.pipeline import generate
from qdeploy.model.schedulers import make_scheduler
from qdeploy.sampling.correction import check_correction, correct
from qdeploy.store.artifact import Artifact, is_artifact, open_artifact
from qdeploy.store.builder import Draft
from qdeploy.store.paths import default_output
from qdeploy.store.timesteps import explain_schedule
from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.hashing import sha256_files
from qdeploy.system.progress import say, track

IMAGES = "images.safetensors"
GRID = "grid.png"
GRID_LIMIT = 64
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def sample(
    source: str | Path | Artifact,
    output: str | Path | None = None,
    *,
    count: int = 16,
    steps: int = 50,
    scheduler: str | None = None,
    seed: int = 0,
    batch: int = 16,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    height: int | None = None,
    width: int | None = None,
    model: str | Path | None = None,
    correction: str = "none",
    overwrite: bool = False,
) -> Artifact:
    """Make images. Image i has the seed ``seed + i``, in whatever batches they are made.

    Args:
        source: an engine, a checkpoint or a model.
        output: folder of the images; in the working directory by default.
        count: number of images.
        steps: number of denoising steps.
        scheduler: a name of `qdeploy.model.schedulers`; the model's own by default.
        seed: the first image's seed.
        batch: number of images that are made together.
        prompts: for pipelines that take prompts or class numbers; used in turns.
        guidance: classifier-free guidance scale.
        eta: share of fresh noise in each step, for schedulers that have it.
        height: of the images, in pixels.
        width: of the images, in pixels.
        model: the pipeline in which an engine or checkpoint runs; by default the one it was made from.
        correction: ``table`` or ``online`` to subtract mean errors from predictions, or ``none``.
        overwrite: replace another artifact at ``output``.

    Returns:
        An artifact of kind ``samples``: ``00000.png`` and so on, each with its seed in a text chunk;
        ``images.safetensors`` with uint8 ``images`` ``[N, C, H, W]``; and ``grid.png``.

    Raises:
        UsageError: an impossible number, an unknown scheduler, missing prompts, no table of corrections.
        InvalidInputError: no pipeline for the source is found, or it cannot make such images; or the
            correction does not fit checkpoint or scheduler.
    """
    for name, value in {"count": count, "steps": steps, "batch": batch}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if prompts is not None and not prompts:
        raise UsageError("the list of prompts is empty")
    if not isinstance(source, Artifact) and is_artifact(Path(source)):
        source = open_artifact(source, "engine", "checkpoint")
    check_correction(correction, source if isinstance(source, Artifact) else None)
    whole = _pipeline_of(source, model)
    origin = source.kind if isinstance(source, Artifact) else "model"
    identity = source.sha256 if isinstance(source, Artifact) else whole.sha256
    asked: dict[str, Any] = {
        "count": count,
        "steps": steps,
        "scheduler": scheduler,
        "prompts": list(prompts) if prompts is not None else None,
        "guidance": guidance,
        "eta": eta,
        "height": height,
        "width": width,
        **({} if correction == "none" else {"correction": correction}),
    }
    place = Path(output) if output else default_output(_path(source, whole), "samples")
    made_from = {origin: identity, "pipeline": _rest_sha256(whole)}
    draft = Draft(place, "samples", made_from, None, seed, asked, overwrite)
    if done := draft.finished():
        return done
    with draft:
        pipeline = cache(lambda: _open_pipeline(source, whole, scheduler, steps, correction))
        images = _make_images(pipeline, draft, range(seed, seed + count), batch, asked)
        settings = {
            "steps": steps,
            "scheduler": type(pipeline().scheduler).__name__,
            origin: identity,
            **({} if correction == "none" else {"correction": correction}),
        }
        _write_images(draft, images, seed, prompts, settings)
        facts = asked | settings | {"shape": list(images.shape[1:])}
        return draft.finish(facts=facts, notes={"pipeline": str(whole.path)})


def _make_images(
    pipeline: Callable[[], Any], draft: Draft, seeds: range, batch: int, asked: dict[str, Any]
) -> Tensor:
    """All images, uint8 ``[N, C, H, W]``; batches that an earlier run finished are not made again."""

    def make(part: Sequence[int]) -> dict[str, Tensor]:
        prompts = asked["prompts"]
        images = generate(
            pipeline(),
            part,
            asked["steps"],
            [prompts[(number - seeds[0]) % len(prompts)] for number in part] if prompts else None,
            asked["guidance"],
            **{name: asked[name] for name in ("eta", "height", "width")},
        )
        if not bool(images.isfinite().all()):
            raise InvalidInputError("the images hold NaN or Inf: does the scheduler fit the model?")
        return {"images": (images * 255).round().clamp(0, 255).to(torch.uint8)}

    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    made = [
        draft.step(f"images-{part[0]}-{len(part)}", partial(make, part))["images"]
        for part in track(parts, "sampling")
    ]
    return draft.tensors(IMAGES, lambda: {"images": torch.cat(made)})["images"]


# -- the pipeline ------------------------------------------------------------------------------------------


def _path(source: str | Path | Artifact, whole: Model) -> Path:
    return source.path if isinstance(source, Artifact) else whole.path


def _pipeline_of(source: str | Path | Artifact, model: str | Path | None) -> Model:
    """The folder whose pipeline a source runs in.

    Raises:
        InvalidInputError: there is no such folder.
    """
    if not isinstance(source, Artifact):
        return open_model(source)
    if model is not None:
        return open_model(model)
    noted = source.manifest["notes"].get("source")
    found = open_if_there(noted)
    if found is not None:
        if found.has_pipeline and found.sha256 == source.facts.get("model_sha256"):
            return found
        say(f"{noted} has changed since {source.path} was made from it, and is not used", level=2)
    own = Model(source.path, str(source.facts["component"]))
    if own.has_pipeline and _is_denoiser_and_scheduler(own):
        return own
    raise InvalidInputError(
        f"the pipeline that {source.path} was made from is no longer at {noted or 'a known path'}: "
        "name its folder with --model"
    )


def _other_components(model: Model) -> dict[str, Any]:
    """Names and classes of a pipeline's components, except the denoiser and those that are absent."""
    index: dict[str, Any] = json.loads((model.path / INDEX).read_text())
    return {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and entry[-1] is not None and name != model.component
    }


def _is_denoiser_and_scheduler(model: Model) -> bool:
    others = _other_components(model)
    return all(name == "scheduler" and (model.path / name).is_dir() for name in others)


def _rest_sha256(model: Model) -> str:
    """Identity of a pipeline without its denoiser."""
    if not model.has_pipeline:
        return sha256_files({})
    files = [model.path / INDEX] + [
        file
        for name in _other_components(model)
        for file in sorted((model.path / name).rglob("*"))
        if file.suffix in (".json", ".txt", ".model", ".safetensors")
    ]
    return sha256_files({file.relative_to(model.path).as_posix(): file for file in files})


def _open_pipeline(
    source: str | Path | Artifact, whole: Model, scheduler: str | None, steps: int, correction: str
) -> Any:
    with _quiet_loading():
        pipeline = whole.pipeline(_denoiser(source))
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    # Schedules that are shifted by the size of the image are not known before the pipeline runs.
    shifted = pipeline.scheduler.config.get("use_dynamic_shifting", False)
    if isinstance(source, Artifact) and not shifted:
        asked = make_scheduler(type(pipeline.scheduler).__name__, pipeline.scheduler)
        asked.set_timesteps(steps)
        if line := explain_schedule(source.facts, torch.as_tensor(asked.timesteps).tolist()):
            say(line)
    if correction != "none":
        artifact = source if isinstance(source, Artifact) else None
        denoiser = getattr(pipeline, whole.component)
        with _quiet_loading():
            corrected = correct(denoiser, correction, artifact, pipeline.scheduler)
            setattr(pipeline, whole.component, corrected)
    return pipeline


def _denoiser(source: str | Path | Artifact) -> nn.Module | None:
    if not isinstance(source, Artifact):
        return None
    if source.kind == "engine":
        from qdeploy.engines.build import load_engine

        return cast(nn.Module, load_engine(source).as_denoiser())
    from qdeploy.quant.checkpoint import load_checkpoint

    return load_checkpoint(source)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Diffusers warns of a denoiser that is not of the class in the index, which is intended here."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- files -------------------------------------------------------------------------------------------------


def _write_images(
    draft: Draft, images: Tensor, seed: int, prompts: Sequence[str] | None, settings: dict[str, Any]
) -> None:
    for number, image in enumerate(images):
        chunks = PngInfo()
        for key, value in {"seed": seed + number, **settings}.items():
            chunks.add_text(key, str(value))
        if prompts is not None:
            chunks.add_text("prompt", prompts[number % len(prompts)])
        _picture(image).save(draft.content / f"{number:05d}.png", pnginfo=chunks)
    _picture(_grid(images[:GRID_LIMIT])).save(draft.content / GRID)


def _grid(images: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` side by side, as square as possible: ``[C, rows * H, columns * W]``."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = images.new_zeros(rows * columns, channels, height, width)
    padded[:count] = images
    grid = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)


def _picture(image: Tensor) -> Image.Image:
    channels = image.shape[0]
    if channels not in _MODES:
        raise InvalidInputError(f"images of {channels} channels cannot be written as PNG")
    pixels = image.permute(1, 2, 0).squeeze(2) if channels == 1 else image.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy(), mode=_MODES[channels])
