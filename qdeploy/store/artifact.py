"""Artifacts: one folder per stage, described, hashed and written whole or not at all.

A folder holds its files and a manifest (`qdeploy.store.manifest`). Each kind has a class, with typed facts
(`qdeploy.store.facts`) and its files as attributes. `open_artifact` is the one way in: it verifies everything,
and afterwards only files that the manifest lists can be had. `qdeploy.store.builder` makes artifacts.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, TypeVar, overload

from qdeploy.store.data_facts import CalibrationSetFacts, SamplesFacts, SensitivityFacts
from qdeploy.store.facts import BundleFacts, CheckpointFacts, EngineFacts
from qdeploy.store.folder import CORRECTION as CORRECTION
from qdeploy.store.folder import INDEX as INDEX
from qdeploy.store.folder import RANGES as RANGES
from qdeploy.store.folder import Artifact as Artifact
from qdeploy.store.folder import DenoiserArtifact as DenoiserArtifact
from qdeploy.store.folder import read_facts, read_measured
from qdeploy.store.manifest import Manifest, damage, read_manifest
from qdeploy.store.manifest import is_artifact as is_artifact
from qdeploy.store.measured import CheckpointMeasured, EngineMeasured, SensitivityMeasured
from qdeploy.store.signature import required_keys, verify_manifest
from qdeploy.system.errors import InvalidInputError


class CalibrationFolder(Artifact):
    """A calibration set on disk; `qdeploy.calibration_set.dataset.CalibrationSet` reads its rows."""

    KIND = "calibration-set"
    FACTS = CalibrationSetFacts
    DESCRIPTION = "denoiser inputs recorded along the sampling trajectory"

    @cached_property
    def facts(self) -> CalibrationSetFacts:
        """Inputs, rows, timesteps, and how they were sampled."""
        return read_facts(self, CalibrationSetFacts)

    @property
    def shards(self) -> list[Path]:
        """The files that hold the rows, in order."""
        names = sorted(name for name in self.files if name.startswith("rows-") and "/" not in name)
        return [self.file(name) for name in names if name.endswith(".safetensors")]

    @property
    def ranges(self) -> Path | None:
        """Ranges of the inputs of layers over time; None in imported sets."""
        return self.find(RANGES)


class Checkpoint(DenoiserArtifact):
    """Integer weights and all scales; `qdeploy.quant.checkpoint.load_checkpoint` makes a network of it."""

    KIND = "checkpoint"
    FACTS = CheckpointFacts
    MEASURED = CheckpointMeasured
    DESCRIPTION = "integer weights and activation scales"

    @cached_property
    def facts(self) -> CheckpointFacts:
        """Formats, target, timesteps, and what stays in float."""
        return read_facts(self, CheckpointFacts)

    @cached_property
    def measured(self) -> CheckpointMeasured:
        """How long it took, by stage."""
        return read_measured(self, CheckpointMeasured)

    @property
    def stage_reports(self) -> dict[str, Any]:
        """What the stages of its recipe reported, each under a name of its own."""
        typed = CheckpointMeasured.__struct_fields__
        return {name: value for name, value in self.manifest.measured.items() if name not in typed}

    @property
    def layers(self) -> Path:
        """Every quantized layer, and what each costs."""
        return self.component_file("layers.json")

    @property
    def quantized(self) -> Path:
        """Integer weights and all scales."""
        return self.component_file("quantized.safetensors")

    @property
    def parameters(self) -> Path:
        """Parameters that stay in float."""
        return self.component_file("parameters.safetensors")

    @property
    def budget(self) -> Path | None:
        """How formats were chosen within a budget, if they were."""
        return self.find("budget.json")


class Bundle(DenoiserArtifact):
    """An ONNX graph in the layout that diffusers' ONNX pipelines open."""

    KIND = "onnx"
    FACTS = BundleFacts
    DESCRIPTION = "an ONNX graph, with Q/DQ where it is quantized"

    @cached_property
    def facts(self) -> BundleFacts:
        """Formats, target, timesteps, inputs of the graph."""
        return read_facts(self, BundleFacts)

    @property
    def graph(self) -> Path:
        """The denoiser's graph; its weights may be in an external data file."""
        return self.component_file("model.onnx")


class EngineFolder(DenoiserArtifact):
    """A graph that one backend runs; `qdeploy.engines.build.load_engine` opens it."""

    KIND = "engine"
    FACTS = EngineFacts
    MEASURED = EngineMeasured
    DESCRIPTION = "a graph that one backend runs"

    @cached_property
    def facts(self) -> EngineFacts:
        """Formats, backend, and the options of its build."""
        return read_facts(self, EngineFacts)

    @cached_property
    def measured(self) -> EngineMeasured:
        """Speed, size and parity on the machine that built it."""
        return read_measured(self, EngineMeasured)

    @property
    def macs(self) -> Path:
        """Multiplications of all layers, and which were meant for int8."""
        return self.file("macs.json")


class Samples(Artifact):
    """Images, with their seeds."""

    KIND = "samples"
    FACTS = SamplesFacts
    DESCRIPTION = "images, with their seeds"

    @cached_property
    def facts(self) -> SamplesFacts:
        """How they were made."""
        return read_facts(self, SamplesFacts)

    @property
    def images(self) -> Path:
        """All images as one tensor."""
        return self.file("images.safetensors")

    def _repr_html_(self) -> str:
        """As of every artifact, with the grid of images below."""
        grid = self.find("grid.png")
        if grid is None:
            return super()._repr_html_()
        data = b64encode(grid.read_bytes()).decode()
        return (
            f'{super()._repr_html_()}<img alt="{escape(self.path.name)}" src="data:image/png;base64,{data}">'
        )


class Sensitivity(Artifact):
    """How much each layer suffers from each number format."""

    KIND = "sensitivity"
    FACTS = SensitivityFacts
    MEASURED = SensitivityMeasured
    DESCRIPTION = "how sensitive each layer is to each number format"

    @cached_property
    def facts(self) -> SensitivityFacts:
        """What was judged."""
        return read_facts(self, SensitivityFacts)

    @cached_property
    def measured(self) -> SensitivityMeasured:
        """How long it took, by pass."""
        return read_measured(self, SensitivityMeasured)

    @property
    def report(self) -> Path:
        """Layers with their harms, those that suffer most first."""
        return self.file("sensitivity.json")

    @property
    def noise(self) -> Path:
        """The measured errors behind the report."""
        return self.file("harm.safetensors")


KINDS: dict[str, type[Artifact]] = {
    each.KIND: each for each in (CalibrationFolder, Checkpoint, Bundle, EngineFolder, Samples, Sensitivity)
}
_A = TypeVar("_A", bound=Artifact)
_B = TypeVar("_B", bound=Artifact)
_C = TypeVar("_C", bound=Artifact)


@overload
def open_artifact(path: str | Path | Artifact, /) -> Artifact: ...
@overload
def open_artifact(path: str | Path | Artifact, one: type[_A], /) -> _A: ...
@overload
def open_artifact(path: str | Path | Artifact, one: type[_A], two: type[_B], /) -> _A | _B: ...
@overload
def open_artifact(
    path: str | Path | Artifact, one: type[_A], two: type[_B], three: type[_C], /
) -> _A | _B | _C: ...
def open_artifact(path: str | Path | Artifact, *kinds: type[Artifact]) -> Artifact:
    """Read and verify an artifact.

    Args:
        path: the folder; or an artifact, which is read and verified again.
        kinds: classes of the kinds that are welcome; any, if none is named.

    Raises:
        InvalidInputError: it is no artifact, damaged, of a newer schema or of another kind; or its manifest names
            files outside of it, or does not name all that lie in it; or signatures are required
            (`qdeploy.store.signature.required_keys`) and it has none that is right.
    """
    artifact = verified(path, *kinds)
    if keys := required_keys():
        verify_manifest(artifact.path, artifact.manifest, keys)
    return artifact


def verified(path: str | Path | Artifact, *kinds: type[Artifact]) -> Artifact:
    """As `open_artifact`, whoever signed it or did not: for what this machine has made itself."""
    path = path.path if isinstance(path, Artifact) else Path(path)
    artifact = described(path, read_manifest(path))
    if kinds and not isinstance(artifact, kinds):
        wanted = " or ".join(each.KIND for each in kinds)
        raise InvalidInputError(f"{path} is of kind {artifact.kind!r}, but {wanted!r} is needed here")
    for problem in damage(path, artifact.manifest):
        raise InvalidInputError(f"{path} is damaged: {problem}; make it again or restore it from a copy")
    return artifact


def described(path: Path, manifest: Manifest) -> Artifact:
    """A folder as its manifest describes it, facts and measurements checked, files not.

    Raises:
        InvalidInputError: of an unknown kind, or with facts or measurements that do not belong to it.
    """
    kind = KINDS.get(manifest.kind)
    if kind is None:
        raise InvalidInputError(f"{path} is of the unknown kind {manifest.kind!r}")
    artifact = kind(path, manifest)
    _ = artifact.facts, artifact.measured
    return artifact
