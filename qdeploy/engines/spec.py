"""What a backend has to know of an engine to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qdeploy.store.artifact import EngineFolder
from qdeploy.store.facts import CallFacts, DenoiserFacts, SizesFacts, TimestepFacts, TimeTableFacts


@dataclass(frozen=True)
class EngineSpec:
    """An engine's files, and how they are to be run. It need not be a finished artifact.

    Attributes:
        folder: holds the folder of the component.
        component: ``unet`` or ``transformer``.
        precision: what everything that is not int8 is computed in.
        weights: their format, or ``none``.
        activations: their format, or ``none``.
        target: what the graph was made for.
        int8_sums: bits that the sums of its int8 products need, if that was found out.
        timesteps: that it serves.
        time_table: the table that stands for its temporal layers.
        files: SHA-256 of its files by name relative to ``folder``; empty while it is being built.
        sha256: identity of the artifact; empty while it is being built.
        dynamic_group: features that the runtime rounds with one scale, where it rounds activations itself.
        call: how the denoiser is called, if that does not follow from its inputs.
        sizes: of images, where its graph takes several.
        device: of the runtime's, where it has several.
    """

    folder: Path
    component: str
    precision: str
    weights: str = "none"
    activations: str = "none"
    target: str | None = None
    int8_sums: int | None = None
    timesteps: TimestepFacts | None = None
    time_table: TimeTableFacts | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    dynamic_group: int | None = None
    call: CallFacts | None = None
    sizes: SizesFacts | None = None
    device: str | None = None

    @classmethod
    def of(cls, artifact: EngineFolder) -> EngineSpec:
        """The specification of a finished engine."""
        facts = artifact.facts
        return cls.described_by(
            artifact.path,
            facts,
            facts.engine_precision,
            int8_sums=facts.int8_sums,
            files=artifact.files,
            sha256=artifact.sha256,
            device=facts.device,
        )

    @classmethod
    def described_by(
        cls,
        folder: Path,
        facts: DenoiserFacts,
        precision: str,
        *,
        int8_sums: int | None = None,
        files: Mapping[str, str] | None = None,
        sha256: str = "",
        device: str | None = None,
    ) -> EngineSpec:
        """The specification of files in a folder that facts of a denoiser describe."""
        return cls(
            folder,
            facts.component,
            precision,
            facts.weights,
            facts.activations,
            facts.target,
            int8_sums,
            facts.timesteps,
            facts.time_table,
            files or {},
            sha256,
            facts.dynamic_group,
            facts.call,
            facts.sizes,
            device,
        )

    @property
    def component_folder(self) -> Path:
        """The folder of the runtime's files."""
        return self.folder / self.component
