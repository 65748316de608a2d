"""Facts about artifacts that hold no denoiser: calibration sets, samples and sensitivities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from qdeploy.store.facts import CallFacts, Facts, RangeFacts, SampledFacts
from qdeploy.store.field_types import (
    Component,
    Count,
    Formats,
    Identifier,
    Number,
    Positive,
    Sha256,
    Timestep,
    Word,
)


class InputFacts(Facts, frozen=True, kw_only=True):
    """An input of a denoiser: its shape without the batch dimension, unless it is ``shared`` by all rows."""

    name: Word
    dtype: Identifier
    shape: Annotated[list[Count], Meta(max_length=16)]
    shared: bool


class CalibrationSetFacts(Facts, frozen=True, kw_only=True):
    """Facts about a calibration set.

    Attributes:
        sample: name of the input that holds the noisy sample.
        inputs: all inputs.
        rows: how many denoiser inputs there are.
        images: from how many images.
        steps: denoiser calls that were kept of each trajectory.
        timesteps: at which the network was called, ascending.
        pairs: whether it is known which rows are conditional under guidance: ``known``, ``undecided``; None without.
        scheduler: class of the scheduler; None if an import does not say.
        inference_steps: of the trajectory.
        guidance: scale of classifier-free guidance.
        layout: of the file that was imported.
        call: how the denoiser is called, if that does not follow from its inputs.
        sampled: how the set was sampled.
        range: of the timesteps, where they are not the scheduler's whole numbers.
    """

    sample: Word
    inputs: Annotated[list[InputFacts], Meta(min_length=1, max_length=256)]
    rows: Positive
    images: Positive
    steps: Positive
    timesteps: list[Timestep]
    pairs: Literal["known", "undecided"] | None
    scheduler: Identifier | None
    inference_steps: Positive
    guidance: Number | None
    layout: Word | None = None
    call: CallFacts | None = None
    sampled: SampledFacts | None = None
    range: RangeFacts | None = None


class PromptFileFacts(Facts, frozen=True, kw_only=True):
    """Prompts that are not listed, since there are many: how many, and the hash of their lines."""

    count: Positive
    sha256: Sha256


class SamplesFacts(Facts, frozen=True, kw_only=True):
    """How images were made; the hash of what made them stands under its kind.

    Attributes:
        count: of images.
        steps: of the sampling.
        scheduler: class of the scheduler.
        prompts: in turns.
        prompt_file: in place of `prompts`, where there are too many to list.
        guidance: scale of classifier-free guidance; None for the pipeline's own.
        eta: share of fresh noise.
        height: of the images in pixels, if it was chosen.
        width: as height.
        shape: of one: channels, height and width of an image; with frames before them of a video.
        negative_prompts: in turns.
        correction: how mean errors were taken out.
        model: hash of the model that made them.
        checkpoint: hash of the checkpoint that did.
        engine: hash of the engine that did.
        media: what they are, if no images: ``frames``, ``audio`` or ``embeddings``.
        arguments: further ones of the pipeline.
        timesteps: those that were chosen, as text.
        npz: whether the images are there as one array too.
        shards: how many images a tar file holds at most, where they are in such files.
    """

    count: Positive
    steps: Positive
    scheduler: Identifier
    prompts: list[str] | None
    guidance: Number | None
    eta: Number | None
    height: Positive | None
    width: Positive | None
    shape: Annotated[list[Positive], Meta(min_length=1, max_length=8)]
    negative_prompts: list[str] | None = None
    correction: Word | None = None
    model: Sha256 | None = None
    checkpoint: Sha256 | None = None
    engine: Sha256 | None = None
    media: Word | None = None
    arguments: dict[str, Any] | None = None
    timesteps: Annotated[str, Meta(max_length=2**16)] | None = None
    npz: bool | None = None
    shards: Positive | None = None
    prompt_file: PromptFileFacts | None = None


class AgreementFacts(Facts, frozen=True, kw_only=True):
    """How far the cheap ranking of layers agrees with the exact one."""

    top: Count
    shared: Count
    layers: list[str]
    spearman: Number


class SensitivityFacts(Facts, frozen=True, kw_only=True):
    """What was judged: layers, formats, and whether exactly (one layer alone) or to first order.

    ``agreement`` says how far the two rankings agree where both were made.
    """

    component: Component
    class_name: Identifier = field(name="class")
    model_sha256: Sha256
    layers: Count
    formats: Formats
    exact: bool
    agreement: AgreementFacts | None = None
