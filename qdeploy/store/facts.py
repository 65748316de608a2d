"""Facts about the content of artifacts: one typed class per kind. Here those of denoisers.

Facts are part of an artifact's identity. They are read strictly: a fact that is missing, unknown or of another
type or range than stated here is refused with its place. A fact that is None by default is left out of the
manifest where it is None, so that artifacts of earlier versions of the same schema, which do not know it, are
read too, and keep their hashes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from qdeploy.store.field_types import (
    Component,
    Count,
    Identifier,
    Number,
    Positive,
    Sha256,
    Size,
    Timestep,
    Word,
)


class Facts(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Facts about the content of an artifact."""

    def to_json(self) -> dict[str, Any]:
        """The facts as they stand in the manifest."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class CallFacts(Facts, frozen=True, kw_only=True):
    """How a denoiser is called, where that does not follow from the names of its inputs (`qdeploy.model.call`).

    Attributes:
        arguments: a node for each argument.
        shared: inputs that are given once for all rows, with their number of axes.
    """

    arguments: Annotated[dict[Word, dict[str, Any]], Meta(max_length=256)]
    shared: dict[Word, Count]


class SampledFacts(Facts, frozen=True, kw_only=True):
    """How a calibration set was sampled, for what is made from it: fields of `Sampling` that were not left open."""

    scheduler: Identifier | None = None
    guidance: Number | None = None
    eta: Number | None = None
    height: Positive | None = None
    width: Positive | None = None
    arguments: dict[str, Any] | None = None


class RangeFacts(Facts, frozen=True, kw_only=True):
    """The timesteps of a network that is not called with its scheduler's whole numbers, as flows and EDM are not.

    The network's t is ``slope`` times the scheduler's plus ``offset``; both None where it is no such function.
    """

    low: Timestep
    high: Timestep
    slope: Number | None
    offset: Number | None


class TimestepFacts(Facts, frozen=True, kw_only=True):
    """Timesteps that scales were found at; the limits of training where the scheduler states them.

    ``range`` is there only where the network is not called with the scheduler's whole numbers. ``exact`` is true
    where features are stored for single timesteps: then a timestep has to be calibrated, or a whole number.
    """

    calibrated: list[Timestep]
    low: Timestep | None = None
    high: Timestep | None = None
    range: RangeFacts | None = None
    exact: bool | None = None


class TimeTableFacts(Facts, frozen=True, kw_only=True):
    """A table of temporal features: how its entries are stored, in how many bytes, and for which timesteps.

    ``schedule`` and ``rows`` are None where it holds all timesteps of training.
    """

    storage: Word
    schedule: Word | None
    rows: list[Timestep] | None
    bytes: Count


class CorrectionFacts(Facts, frozen=True, kw_only=True):
    """The type of prediction that mean errors were measured for, and the hash of their file."""

    prediction_type: Word
    sha256: Sha256


class SizesFacts(Facts, frozen=True, kw_only=True):
    """Sizes of images that a graph takes: see `qdeploy.store.sizes`.

    Attributes:
        factor: pixels of an image for each pixel of a latent.
        multiple: what divides height and width of every latent.
        listed: heights and widths in latent pixels, where they are listed.
        low: smallest height and width, where they are a range.
        high: largest height and width, where they are a range.
    """

    factor: Positive
    multiple: Positive
    listed: Annotated[list[Size], Meta(min_length=1, max_length=1000)] | None = None
    low: Size | None = None
    high: Size | None = None


class PipelineFacts(Facts, frozen=True, kw_only=True):
    """The rest of a pipeline.

    Attributes:
        graphs: folders of graphs by component.
        torch: why a component stays in torch, by component.
        precision: what each graph is computed in, by component; None in bundles.
    """

    graphs: dict[Component, list[Component]]
    torch: dict[Component, str]
    precision: dict[Component, Word] | None = None


class DenoiserFacts(Facts, frozen=True, kw_only=True):
    """Facts about a denoiser that a checkpoint passes on to its bundle and its engines.

    Attributes:
        component: its name in a pipeline, ``unet`` or ``transformer``, and that of its folder.
        class_name: its diffusers class; ``class`` in the manifest.
        model_sha256: identity of the full-precision denoiser.
        precision: ``W8A8`` or the like; ``fp32`` where nothing is quantized.
        weights: format of weights, or ``none``.
        activations: format of activations, or ``none``.
        target: what it was made to run on.
        base_model: Hub id or name of the model.
        timesteps: that it was calibrated for.
        timestep_scales: whether scales depend on the timestep.
        time_table: the table that stands for the layers that compute temporal features.
        correction: mean errors of the prediction that travel with it.
        dynamic_group: features that the runtime rounds with one scale, where it rounds activations itself.
        call: how it is called, if that does not follow from its inputs.
        sampled: how its calibration set was sampled.
        sizes: of images, where the graph takes several.
    """

    component: Component
    class_name: Identifier = field(name="class")
    model_sha256: Sha256
    precision: Word
    weights: Word
    activations: Word
    target: Word
    base_model: Word | None = None
    timesteps: TimestepFacts | None = None
    timestep_scales: bool | None = None
    time_table: TimeTableFacts | None = None
    correction: CorrectionFacts | None = None
    dynamic_group: Positive | None = None
    call: CallFacts | None = None
    sampled: SampledFacts | None = None
    sizes: SizesFacts | None = None

    @property
    def quantized(self) -> bool:
        """Whether weights or activations are quantized."""
        return (self.weights, self.activations) != ("none", "none")

    def handed_on(self, **changes: Any) -> dict[str, Any]:
        """The facts that travel with the denoiser, by field, with some changed."""
        travelling = {name: getattr(self, name) for name in DenoiserFacts.__struct_fields__}
        return travelling | changes


class CheckpointFacts(DenoiserFacts, frozen=True, kw_only=True):
    """Facts about a checkpoint.

    Attributes:
        simulated: why no engine can run it; empty if one can.
        layers: how many are quantized.
        temporal: whether layers that depend on the timestep alone are among them.
        left_in_float: layers of the coverage that are not, by the reason.
    """

    simulated: list[str]
    layers: Count
    temporal: bool | None = None
    left_in_float: dict[str, list[str]] | None = None


class PortFacts(Facts, frozen=True, kw_only=True):
    """An input of a graph; axes of free size have names."""

    name: Word
    dtype: Word
    shape: Annotated[list[Word], Meta(max_length=16)]


class LintFacts(Facts, frozen=True, kw_only=True):
    """Results of `lint` on a graph: findings by severity and by rule, and shares of multiplications by type."""

    counts: dict[str, Count]
    rules: dict[str, Count]
    waived: dict[str, Count]
    shares: dict[str, Number]


class BundleFacts(DenoiserFacts, frozen=True, kw_only=True):
    """Facts about an ONNX bundle.

    Attributes:
        simulated: why no engine can run it; empty, since such checkpoints are not exported.
        inputs: of the graph.
        lint: findings of the rules of TensorRT.
        pipeline: what else of the pipeline it holds.
    """

    simulated: list[str]
    inputs: list[PortFacts] | None = None
    lint: LintFacts | None = None
    pipeline: PipelineFacts | None = None


class EngineFacts(DenoiserFacts, frozen=True, kw_only=True):
    """Facts about an engine; `shapes` to `optimization_level` are options of TensorRT.

    Attributes:
        backend: its name.
        backend_version: of the runtime that built it.
        engine_precision: what everything that is not int8 is computed in.
        batch: that its speed was measured with.
        threads: that it runs on; None for the runtime's own choice.
        int8_sums: bits that the sums of its int8 products need.
        optimize_for: what its placement was searched for.
        min_sqnr: least SQNR of the placement, in dB.
        quantizers_left_out: by the placement.
        options: of a backend that another package brings.
        pipeline: what else of the pipeline it holds.
        device: of OpenVINO: ``CPU``, ``GPU`` or ``NPU``.
    """

    backend: Word
    backend_version: Word
    engine_precision: Word
    batch: Positive
    threads: Positive | None
    int8_sums: Literal[16, 32] | None = None
    optimize_for: Word | None = None
    min_sqnr: Number | None = None
    quantizers_left_out: list[str] | None = None
    shapes: str | None = None
    workspace: Number | None = None
    refit: bool | None = None
    weight_streaming: bool | None = None
    hardware_compatible: bool | None = None
    version_compatible: bool | None = None
    strip_plan: bool | None = None
    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    options: dict[str, Any] | None = None
    pipeline: PipelineFacts | None = None
    device: Word | None = None
