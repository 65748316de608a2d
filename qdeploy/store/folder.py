"""What all artifacts have in common: a verified folder, its manifest, and paths of listed files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from qdeploy.store.facts import DenoiserFacts, Facts
from qdeploy.store.manifest import Manifest, typed
from qdeploy.store.measured import Measured
from qdeploy.store.probe import PROBE, Probe, read_probe
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.tables import Table

CORRECTION = "correction.safetensors"
RANGES = "ranges.safetensors"
INDEX = "model_index.json"
_F = TypeVar("_F", bound=Facts)
_M = TypeVar("_M", bound=Measured)


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
    FACTS: ClassVar[type[Facts]]
    MEASURED: ClassVar[type[Measured]] = Measured
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

    @cached_property
    def measured(self) -> Measured:
        """What depends on the machine and the run that made it; no part of the identity."""
        return read_measured(self, Measured)

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

    def _repr_html_(self) -> str:
        """What a notebook shows: kind, folder, size, and the facts that are one word or number."""
        plain = {
            name: value
            for name, value in self.manifest.facts.items()
            if isinstance(value, str | int | float) and not name.endswith("sha256")
        }
        shown = {"folder": self.path, "MB": f"{self.size() / 2**20:.1f}", "sha256": self.sha256[:12]} | plain
        rows = [[name, str(value)] for name, value in shown.items()]
        return Table([self.kind, self.DESCRIPTION], rows)._repr_html_()

    def summary(self, seconds: float) -> dict[str, Any]:
        """The JSON object that every verb prints for what it wrote."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "seconds": round(seconds, 3),
        }


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


def read_facts(artifact: Artifact, kind: type[_F]) -> _F:
    """An artifact's facts as an object of their class.

    Raises:
        InvalidInputError: they are not those of the kind.
    """
    return typed(artifact.manifest.facts, kind, artifact.path)


def read_measured(artifact: Artifact, kind: type[_M]) -> _M:
    """An artifact's measurements as an object of their class.

    Raises:
        InvalidInputError: one of them is of another type or range.
    """
    return typed(artifact.manifest.measured, kind, artifact.path)
