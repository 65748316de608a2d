"""What was measured while an artifact was made: one class of typed results per kind of artifact that has any.

Measurements depend on the machine and on the run, so they are no part of an artifact's identity. Types and ranges
are checked when an artifact is opened. Names that this version does not know are kept in the manifest and skipped
here: earlier versions wrote others, and stages of other packages report under names of their own.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from qdeploy.store.field_types import Count

Seconds = Annotated[float, Meta(ge=0)]
Milliseconds = Annotated[float, Meta(ge=0)]
Megabytes = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Measured(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is measured of every artifact.

    Attributes:
        seconds: that making it took, over all processes that worked on it.
    """

    seconds: Seconds = 0.0

    def to_json(self) -> dict[str, Any]:
        """The measurements as they stand in the manifest; those that were not made are left out."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class CheckpointMeasured(Measured, frozen=True, kw_only=True):
    """What a calibration measured.

    Attributes:
        stage_seconds: that each stage took, by its number and name.
    """

    stage_seconds: dict[str, Seconds] | None = None


class SensitivityMeasured(Measured, frozen=True, kw_only=True):
    """What a sensitivity analysis measured.

    Attributes:
        pass_seconds: of the passes over all layers: ``cheap`` and ``exact``.
    """

    pass_seconds: dict[str, Seconds] | None = None


class LatencyMeasured(Struct, frozen=True, kw_only=True):
    """Times of a call in milliseconds: the median and the 95th percentile."""

    median: Milliseconds
    p95: Milliseconds


class DistanceMeasured(Struct, frozen=True, kw_only=True):
    """The distance of outputs from expected ones, as `qdeploy.system.decibels.distance` states it.

    Attributes:
        sqnr_db: median over rows, in dB.
        worst_db: of the worst row, in dB.
        pooled_db: over all elements, in dB.
        same_rows: share of the rows that agree except for the last bits.
        max_abs: largest absolute difference.
    """

    sqnr_db: float
    worst_db: float
    pooled_db: float
    same_rows: Share
    max_abs: float


class SizeMeasured(Struct, frozen=True, kw_only=True):
    """Parity and latency of one sample at one size of images."""

    parity: DistanceMeasured
    ms: LatencyMeasured


class MachineMeasured(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The machine: its processor with the instruction sets that matter, usable cores, and its GPU if one was used."""

    cpu: str
    features: list[str]
    cores: Count
    gpu: dict[str, Any] | None = None


class PlanMeasured(Struct, frozen=True, kw_only=True):
    """What a build reports of the quantized layers of an engine that cannot run on the machine that built it.

    Attributes:
        planned: layers that were to run in int8.
        as_planned: those of them that do.
        kinds: those that do, by type.
        products: kernels that multiply, by precision.
    """

    planned: Count
    as_planned: Count
    kinds: dict[str, Count]
    products: dict[str, Count]


class CandidateMeasured(Struct, frozen=True, kw_only=True):
    """An engine that a placement was compared on: time of a call in ms, and SQNR on the probe in dB."""

    ms: Milliseconds
    sqnr_db: float


class DecisionMeasured(Struct, frozen=True, kw_only=True):
    """The decision about one quantizer, and the reason.

    Attributes:
        quantizer: name of its QuantizeLinear.
        products: names of the layers that read it.
        macs: their multiplications for one sample.
        int8_ms: their time behind the quantizer, the quantizing included where it has a kernel of its own.
        float_ms: their time without it.
        saved_ms: what int8 saves in the whole engine: the saving of its group of like layers, divided by MACs.
        alone_db: SQNR of the prediction if this were the only quantizer, median over rows.
        int8: whether it was kept.
        why: the reason.
    """

    quantizer: str
    products: list[str]
    macs: int
    int8_ms: float
    float_ms: float
    saved_ms: float
    alone_db: float
    int8: bool
    why: str


class PlacementMeasured(Struct, frozen=True, kw_only=True):
    """How quantizers were chosen for speed.

    Attributes:
        taken: which of ``engines`` won.
        engines: what was built and measured on the way, by name.
        decisions: one for each quantizer.
    """

    taken: str
    engines: dict[str, CandidateMeasured]
    decisions: list[DecisionMeasured]


class EngineMeasured(Measured, frozen=True, kw_only=True):
    """What was measured of an engine by the machine that built it.

    Attributes:
        ms: of a call with as many samples as its facts state in ``batch``; None if it was not run.
        load_seconds: until the first result of a new process.
        int8_mac_share: share of all multiplications that ran in int8.
        int8_mac_share_of_meant: the same, of those of quantized layers; 1 where there are none.
        parity: to the simulation on the probe's rows, or to full precision where nothing is quantized.
        sizes: of images, by height and width in latent pixels, where the engine takes several.
        size_mb: of the denoiser's files.
        machine: that built it.
        placement: how quantizers were chosen, with ``optimize_for``.
        build: what the runtime's own build took, where the backend reports it.
        not_run: why the machine that built it could not run it; then what follows stands for measurements.
        planned: what the build reports of quantized layers.
        float32_results: how many layers write 32-bit floats.
        moved: bytes that all layers read and write, by what they are.
    """

    ms: LatencyMeasured | None = None
    load_seconds: Seconds | None = None
    int8_mac_share: Share | None = None
    int8_mac_share_of_meant: Share | None = None
    parity: DistanceMeasured | None = None
    sizes: dict[str, SizeMeasured] | None = None
    size_mb: Megabytes | None = None
    machine: MachineMeasured | None = None
    placement: PlacementMeasured | None = None
    build: dict[str, Any] | None = None
    not_run: str | None = None
    planned: PlanMeasured | None = None
    float32_results: Count | None = None
    moved: dict[str, Any] | None = None
