"""Artifacts: one folder per stage, described, hashed and written whole or not at all.

A folder holds its files and a manifest (`qdeploy.store.manifest`). Each kind has a class, with typed facts
(`qdeploy.store.facts`) and its files as attributes. `open_artifact` is the one way in: it verifies everything,
and afterwards only files that the manifest lists can be had. `qdeploy.store.builder` makes artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

from qdeploy.store.facts import (
    BundleFacts,
    CalibrationSetFacts,
    CheckpointFacts,
    DenoiserFacts,
    EngineFacts,
    Facts,
    SamplesFacts,
    SensitivityFacts,
)
from qdeploy.store.manifest import MANIFEST, Manifest, damage, is_artifact, read_manifest, typed
from qdeploy.store.probe import PROBE, Probe, read_probe
from qdeploy.system.errors import InvalidInputError

CORRECTION = "correction.safetensors"
RANGES = "ranges.safetensors"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Artifact:
    """A complete, verified artifact folder.

    Attributes:
        path: the folder.
        manifest: what ``qdeploy.json`` says.
    """

    path: Path
    manifest: Manifest
    KIND: ClassVar[str]
    DESCRIPTION: ClassVar[str]

    @cached_property
    def facts(self) -> Facts:
        """What the stage says of its content; part of the identity."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The word for it in manifests: ``checkpoint``, ``onnx``, ``engine``, ..."""
        return self.manifest.kind

    @property
    def sha256(self) -> str:
        """The identity: equal content made in the same way has an equal hash."""
        return self.manifest.sha256

    @property
    def made_from(self) -> Mapping[str, str]:
        """Hashes of the artifacts and the model that it was made from, by kind."""
        return self.manifest.made_from

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe, where one was involved."""
        return self.manifest.recipe

    @property
    def seed(self) -> int | None:
        """The seed that all randomness of the stage derives from."""
        return self.manifest.seed

    @property
    def measured(self) -> dict[str, Any]:
        """What depends on the machine that made it: times, sizes, parity."""
        return self.manifest.measured

    @property
    def source(self) -> str | None:
        """What the full-precision model was opened by; see `qdeploy.model.origin`."""
        return self.manifest.notes.source

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of every file, by relative name."""
        return self.manifest.files

    def file(self, name: str) -> Path:
        """Path of one of the artifact's files.

        Raises:
            InvalidInputError: it is not one of them.
        """
        if name not in self.files:
            raise InvalidInputError(f"{self.path} has no file {name}: make it again")
        return self.path / name

    def find(self, name: str) -> Path | None:
        """Path of one of the artifact's files; None if it is not one of them."""
        return self.path / name if name in self.files else None

    def size(self, folder: str = "") -> int:
        """Bytes of all files, or of those below one of its folders."""
        below = f"{folder}/" if folder else ""
        return sum(self.file(name).stat().st_size for name in self.files if name.startswith(below))

    def summary(self, seconds: float) -> dict[str, Any]:
        """The JSON object that every verb prints for what it wrote."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "seconds": round(seconds, 3),
        }


class CalibrationFolder(Artifact):
    """A calibration set on disk; `qdeploy.calibration_set.dataset.CalibrationSet` reads its rows."""

    KIND = "calibration-set"
    DESCRIPTION = "denoiser inputs recorded along the sampling trajectory"

    @cached_property
    def facts(self) -> CalibrationSetFacts:
        """Inputs, rows, timesteps, and how they were sampled."""
        return _facts(self, CalibrationSetFacts)

    @property
    def shards(self) -> list[Path]:
        """The files that hold the rows, in order."""
        names = sorted(name for name in self.files if name.startswith("rows-") and "/" not in name)
        return [self.file(name) for name in names if name.endswith(".safetensors")]

    @property
    def ranges(self) -> Path | None:
        """Ranges of the inputs of layers over time; None in imported sets."""
        return self.find(RANGES)


class DenoiserArtifact(Artifact):
    """What checkpoints, bundles and engines have in common: a denoiser's folder, and its probe."""

    @cached_property
    def facts(self) -> DenoiserFacts:
        """What is known of the denoiser."""
        raise NotImplementedError

    @property
    def component(self) -> str:
        """The denoiser's name in a pipeline, and its folder here."""
        return self.facts.component

    @property
    def config(self) -> Path:
        """The denoiser's diffusers configuration."""
        return self.component_file("config.json")

    @property
    def ranges(self) -> Path | None:
        """Ranges of quantized tensors over time, where they were kept."""
        return self.find(f"{self.component}/{RANGES}")

    @property
    def correction(self) -> Path | None:
        """Mean errors of the prediction by timestep, where they were measured."""
        return self.find(f"{self.component}/{CORRECTION}")

    @property
    def is_pipeline(self) -> bool:
        """Whether it has the index of a pipeline."""
        return INDEX in self.files

    def component_file(self, name: str) -> Path:
        """Path of a file in the denoiser's folder.

        Raises:
            InvalidInputError: there is none.
        """
        return self.file(f"{self.component}/{name}")

    def probe(self) -> Probe:
        """Held-out inputs with their expected outputs.

        Raises:
            InvalidInputError: there are none.
        """
        self.file(PROBE)
        return read_probe(self.path)


class Checkpoint(DenoiserArtifact):
    """Integer weights and all scales; `qdeploy.quant.checkpoint.load_checkpoint` makes a network of it."""

    KIND = "checkpoint"
    DESCRIPTION = "integer weights and activation scales"

    @cached_property
    def facts(self) -> CheckpointFacts:
        """Formats, target, timesteps, and what stays in float."""
        return _facts(self, CheckpointFacts)

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
        return self.find(f"{self.component}/budget.json")


class Bundle(DenoiserArtifact):
    """An ONNX graph in the layout that diffusers' ONNX pipelines open."""

    KIND = "onnx"
    DESCRIPTION = "an ONNX graph, with Q/DQ where it is quantized"

    @cached_property
    def facts(self) -> BundleFacts:
        """Formats, target, timesteps, inputs of the graph."""
        return _facts(self, BundleFacts)

    @property
    def graph(self) -> Path:
        """The denoiser's graph; its weights may lie beside it."""
        return self.component_file("model.onnx")


class EngineFolder(DenoiserArtifact):
    """A graph that one backend runs; `qdeploy.engines.build.load_engine` opens it."""

    KIND = "engine"
    DESCRIPTION = "a graph that one backend runs"

    @cached_property
    def facts(self) -> EngineFacts:
        """Formats, backend, and the options of its build."""
        return _facts(self, EngineFacts)

    @property
    def macs(self) -> Path:
        """Multiplications of all layers, and which were meant for int8."""
        return self.file("macs.json")


class Samples(Artifact):
    """Images, with their seeds."""

    KIND = "samples"
    DESCRIPTION = "images, with their seeds"

    @cached_property
    def facts(self) -> SamplesFacts:
        """How they were made."""
        return _facts(self, SamplesFacts)

    @property
    def images(self) -> Path:
        """All images as one tensor."""
        return self.file("images.safetensors")


class Sensitivity(Artifact):
    """How much each layer suffers from each number format."""

    KIND = "sensitivity"
    DESCRIPTION = "how sensitive each layer is to each number format"

    @cached_property
    def facts(self) -> SensitivityFacts:
        """What was judged."""
        return _facts(self, SensitivityFacts)

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
_F = TypeVar("_F", bound=Facts)
_A = TypeVar("_A", bound=Artifact)
_B = TypeVar("_B", bound=Artifact)
_C = TypeVar("_C", bound=Artifact)


def _facts(artifact: Artifact, kind: type[_F]) -> _F:
    return typed(artifact.manifest.facts, kind, artifact.path)


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
            files outside of it, or does not name all that lie in it.
    """
    path = path.path if isinstance(path, Artifact) else Path(path)
    artifact = described(path, read_manifest(path))
    if kinds and not isinstance(artifact, kinds):
        wanted = " or ".join(each.KIND for each in kinds)
        raise InvalidInputError(f"{path} is of kind {artifact.kind!r}, but {wanted!r} is needed here")
    for problem in damage(path, artifact.manifest):
        raise InvalidInputError(f"{path} is damaged: {problem}; make it again or restore it from a copy")
    return artifact


def described(path: Path, manifest: Manifest) -> Artifact:
    """A folder as its manifest describes it, facts checked, files not.

    Raises:
        InvalidInputError: of an unknown kind, or with facts that do not belong to it.
    """
    kind = KINDS.get(manifest.kind)
    if kind is None:
        raise InvalidInputError(f"{path} is of the unknown kind {manifest.kind!r}")
    artifact = kind(path, manifest)
    _ = artifact.facts
    return artifact


__all__ = ["KINDS", "MANIFEST", "Artifact", "is_artifact", "open_artifact", "read_manifest"]
