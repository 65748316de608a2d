"""Call any stock diffusers pipeline in one way: seeds in, images, videos, sounds or embeddings out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qdeploy.model.folder import COMPONENTS
from qdeploy.model.media import Media, read_media
from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError

_BINNED = (32, 64, 128, 256)  # sizes of latents that PixArt's pipelines have aspect ratios for


def generate(
    pipeline: Any,
    seeds: Sequence[int],
    steps: int,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    on_step: Callable[[], None] | None = None,
    latents_alone: bool = False,
    **options: Any,
) -> Media:
    """What a pipeline makes, one of it for each seed.

    Each has its own generator, so that it does not depend on the batch it was made in.

    Args:
        pipeline: a diffusers pipeline.
        seeds: one seed per image.
        steps: ``num_inference_steps``.
        prompts: one prompt per image, for pipelines that take prompts; class labels, as decimal
            numbers, for pipelines that take those.
        guidance: classifier-free guidance scale, where the pipeline knows one.
        on_step: called after each step, where the pipeline offers a callback.
        latents_alone: ask for latents and decode none, where the pipeline can do so.
        options: further arguments of the pipeline, such as ``eta``, ``height`` or ``width``.

    Raises:
        UsageError: prompts are missing, or an option is unknown to the pipeline.
        InvalidInputError: the pipeline cannot make images of that size, made something unknown, or did not call the
            denoiser that it was given.
        CapabilityError: the pipeline needs a package that is not installed.
    """
    known = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent" if latents_alone else "np",
    }
    arguments = {name: value for name, value in arguments.items() if name in known}
    if "prompt" in known:
        if prompts is None:
            raise UsageError(f"{type(pipeline).__name__} needs prompts: pass --prompt TEXT or --prompts FILE")
        arguments["prompt"] = list(prompts)
    elif "class_labels" in known:
        labels = prompts if prompts is not None else [str(seed % 10) for seed in seeds]
        try:
            arguments["class_labels"] = [int(label) for label in labels]
        except ValueError as error:
            raise UsageError(f"{type(pipeline).__name__} takes class numbers as prompts: {error}") from error
    if "batch_size" in known and "prompt" not in known:
        arguments["batch_size"] = len(seeds)
    if "use_resolution_binning" in known and not _has_bins(pipeline):
        arguments["use_resolution_binning"] = False
    if guidance is not None:
        options["guidance_scale"] = guidance
    for name, value in options.items():
        if value is None:
            continue
        if name not in known:
            raise UsageError(f"{type(pipeline).__name__} takes no {name!r}")
        arguments[name] = value
    if on_step is not None and "callback_on_step_end" in known:
        arguments["callback_on_step_end"] = _callback(on_step)
    with _must_be_called(pipeline):
        try:
            result = pipeline(**arguments)
        except NameError as error:  # pipelines import what is optional for others where it is installed
            package = str(error.name)
            if isinstance(error, UnboundLocalError) or find_spec(package) is not None:
                raise
            raise CapabilityError(
                f"{type(pipeline).__name__} needs the package {package}: pip install {package}"
            ) from error
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(f"{type(pipeline).__name__} cannot sample as asked: {first}") from error
    return Media("latents", torch.empty(0)) if latents_alone else read_media(result, type(pipeline).__name__)


@contextmanager
def _must_be_called(pipeline: Any) -> Iterator[None]:
    """Within, the pipeline has to call its denoiser: never results of another network under its name."""
    name = next((name for name in COMPONENTS if isinstance(getattr(pipeline, name, None), nn.Module)), None)
    calls = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    hook = None if name is None else getattr(pipeline, name).register_forward_pre_hook(count)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
    if hook is not None and not calls:
        raise InvalidInputError(f"{type(pipeline).__name__} did not call the {name} that it was given")


def sample_images(
    pipeline: Any,
    sampling: Sampling,
    images: Sequence[int],
    first_seed: int | None = None,
    latents_alone: bool = False,
) -> Media:
    """Some images of a pipeline, by their numbers, sampled as `Sampling` says.

    Args:
        pipeline: a diffusers pipeline.
        sampling: how.
        images: numbers of the images.
        first_seed: seed of image 0; the sampling's by default.
        latents_alone: see `generate`.

    Raises:
        UsageError: prompts are missing, or an option is unknown to the pipeline.
        InvalidInputError: the pipeline cannot make images of that size.
    """
    first = sampling.seed if first_seed is None else first_seed
    known = inspect.signature(pipeline.__call__).parameters
    set_there = "eta" not in known and getattr(pipeline.scheduler, "own_eta", None) == sampling.eta
    return generate(
        pipeline,
        [first + image for image in images],
        sampling.steps,
        sampling.prompts_of(images),
        sampling.guidance,
        latents_alone=latents_alone,
        eta=None if set_there else sampling.eta,
        height=sampling.height,
        width=sampling.width,
        negative_prompt=sampling.negative_prompts_of(images),
        **sampling.inputs_of(images),
        **(sampling.arguments or {}),
    )


def _has_bins(pipeline: Any) -> bool:
    """Whether PixArt's pipelines know aspect ratios for the size that their transformer was trained at."""
    return getattr(pipeline.transformer.config, "sample_size", None) in _BINNED


def _callback(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return kwargs

    return callback
