"""Call any stock diffusers pipeline in one way: seeds in, images out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.model.sampling import Sampling
from qdeploy.system.errors import InvalidInputError, UsageError

_BINNED = (32, 64, 128, 256)  # sizes of latents that PixArt's pipelines have aspect ratios for


def generate(
    pipeline: Any,
    seeds: Sequence[int],
    steps: int,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    on_step: Callable[[], None] | None = None,
    **options: Any,
) -> Tensor:
    """Images of a pipeline, one for each seed.

    Every image has its own generator, so that it does not depend on the batch it was made in.

    Args:
        pipeline: a diffusers pipeline.
        seeds: one seed per image.
        steps: ``num_inference_steps``.
        prompts: one prompt per image, for pipelines that take prompts; class labels, as decimal
            numbers, for pipelines that take those.
        guidance: classifier-free guidance scale, where the pipeline knows one.
        on_step: called after each step, where the pipeline offers a callback.
        options: further arguments of the pipeline, such as ``eta``, ``height`` or ``width``.

    Returns:
        Images ``[N, C, H, W]`` in [0, 1].

    Raises:
        UsageError: prompts are missing, or an option is unknown to the pipeline.
        InvalidInputError: the pipeline cannot make images of that size.
    """
    known = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",
    }
    if "prompt" in known:
        if prompts is None:
            raise UsageError(f"{type(pipeline).__name__} needs prompts: pass --prompts FILE")
        arguments["prompt"] = list(prompts)
    elif "class_labels" in known:
        labels = prompts if prompts is not None else [str(seed % 10) for seed in seeds]
        try:
            arguments["class_labels"] = [int(label) for label in labels]
        except ValueError as error:
            raise UsageError(f"{type(pipeline).__name__} takes class numbers as prompts: {error}") from error
    elif "batch_size" in known:
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
    try:
        images = pipeline(**arguments).images
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(f"{type(pipeline).__name__} cannot sample as asked: {first}") from error
    return torch.as_tensor(images).permute(0, 3, 1, 2).contiguous()


def sample_images(
    pipeline: Any, sampling: Sampling, images: Sequence[int], first_seed: int | None = None
) -> Tensor:
    """Some images of a pipeline, by their numbers, sampled as `Sampling` says.

    Args:
        pipeline: a diffusers pipeline.
        sampling: how.
        images: numbers of the images.
        first_seed: seed of image 0; the sampling's by default.

    Returns:
        Images ``[N, C, H, W]`` in [0, 1].

    Raises:
        UsageError: prompts are missing, or an option is unknown to the pipeline.
        InvalidInputError: the pipeline cannot make images of that size.
    """
    first = sampling.seed if first_seed is None else first_seed
    return generate(
        pipeline,
        [first + image for image in images],
        sampling.steps,
        sampling.prompts_of(images),
        sampling.guidance,
        eta=sampling.eta,
        height=sampling.height,
        width=sampling.width,
        negative_prompt=sampling.negative_prompts_of(images),
    )


def _has_bins(pipeline: Any) -> bool:
    """Whether PixArt's pipelines know aspect ratios for the size that their transformer was trained at."""
    return getattr(pipeline.transformer.config, "sample_size", None) in _BINNED


def _callback(on_step: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return kwargs

    return callback
