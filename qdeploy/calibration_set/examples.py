"""Ask a model's own pipeline how it calls its denoiser, with as little work as possible."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from qdeploy.calibration_set.survey import Survey, survey
from qdeploy.model.folder import Model
from qdeploy.model.pipeline import generate

PROMPT = "a photo of a cat"


def pipeline_survey(model: Model, denoiser: nn.Module, steps: int) -> Survey:
    """How the pipeline of a model calls its denoiser in a short trajectory, with all options at their defaults.

    Args:
        model: with its pipeline.
        denoiser: its network; one call of it is computed, and repeated.
        steps: of the trajectory; the inputs of so many calls are kept.

    Raises:
        UsageError: the pipeline needs more than a prompt.
        InvalidInputError: it cannot be run, or calls its denoiser in a way that cannot be recorded.
    """
    pipeline = model.pipeline(denoiser)
    prompted = "prompt" in inspect.signature(pipeline.__call__).parameters

    def run(images: range) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prompts = [PROMPT] * len(images) if prompted else None
            generate(pipeline, list(images), steps, prompts, latents_alone=True)

    return survey(pipeline, denoiser, run, keep=steps)
