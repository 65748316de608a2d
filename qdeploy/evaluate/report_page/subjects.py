"""The artifacts that a report compares, and those that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdeploy.engines.registry import find_backend
from qdeploy.evaluate.baselines import is_baseline
from qdeploy.model.folder import Model
from qdeploy.model.origin import source_model
from qdeploy.store.artifact import (
    Artifact,
    CalibrationFolder,
    Checkpoint,
    DenoiserArtifact,
    EngineFolder,
    Samples,
    open_artifact,
)
from qdeploy.store.facts import SampledFacts
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.progress import say


@dataclass(frozen=True)
class Subject:
    """One way to run the model that the report compares.

    Attributes:
        name: the folder's name, or its whole path where two names are equal.
        artifact: an engine, or an ONNX bundle or checkpoint that no other named artifact was made from.
        before: the named artifacts that it was made from, by kind.
    """

    name: str
    artifact: DenoiserArtifact
    before: dict[str, DenoiserArtifact]

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint, if it was named."""
        chain = (self.artifact, *self.before.values())
        return next((artifact for artifact in chain if isinstance(artifact, Checkpoint)), None)

    @property
    def is_baseline(self) -> bool:
        """Whether nothing of it is quantized."""
        return is_baseline(self.artifact)


@dataclass(frozen=True)
class Given:
    """The artifacts at the paths of a report.

    Attributes:
        subjects: what is compared, in the order it was named.
        samples: folders of images.
        sets: calibration sets.
        model_sha256: identity of the full-precision model, the same for all subjects.
    """

    subjects: list[Subject]
    samples: list[Samples]
    sets: list[CalibrationFolder]
    model_sha256: str

    @property
    def sampled(self) -> SampledFacts | None:
        """How the calibration set of the first subject that says so was sampled."""
        every = (subject.artifact.facts.sampled for subject in self.subjects)
        return next((sampled for sampled in every if sampled is not None), None)


def open_given(paths: Sequence[str | Path | Artifact]) -> Given:
    """Open the artifacts of a report and see what belongs to what.

    Raises:
        UsageError: nothing is named that could be compared.
        InvalidInputError: a path is no artifact, or they belong to different models.
    """
    artifacts = {artifact.sha256: artifact for path in paths for artifact in [open_artifact(path)]}.values()
    staged = [artifact for artifact in artifacts if isinstance(artifact, DenoiserArtifact)]
    used = {sha256 for artifact in staged for sha256 in artifact.made_from.values()}
    ends = [artifact for artifact in staged if artifact.sha256 not in used]
    if not ends:
        raise UsageError("name at least one engine, ONNX bundle or checkpoint to report on")
    models = {artifact.facts.model_sha256 for artifact in ends}
    if len(models) > 1:
        named = ", ".join(str(artifact.path) for artifact in ends)
        raise InvalidInputError(f"{named} were made from different models: make one report for each")
    names = [artifact.path.resolve().name for artifact in ends]
    subjects = [
        Subject(
            name if names.count(name) == 1 else str(artifact.path),
            artifact,
            {other.kind: other for other in staged if other.sha256 in artifact.made_from.values()},
        )
        for name, artifact in zip(names, ends, strict=True)
    ]
    samples = [artifact for artifact in artifacts if isinstance(artifact, Samples)]
    sets = [artifact for artifact in artifacts if isinstance(artifact, CalibrationFolder)]
    return Given(subjects, samples, sets, models.pop())


def find_reference(given: Given, reference: str | Path | Model | None) -> Model | None:
    """The full-precision model: the named one, or the one at the path that the artifacts note, if it still exists.

    Raises:
        InvalidInputError: the named one is not the one that the subjects were made from.
    """
    first = given.subjects[0].artifact
    try:
        return source_model(first, reference)
    except InvalidInputError as error:
        if reference is not None:
            raise
        say(f"quality is measured on the probe alone: {error}")
        return None


def can_run(subject: Subject) -> bool:
    """Whether this machine can run an engine; others are shown without new measurements."""
    if not isinstance(subject.artifact, EngineFolder):
        return True
    try:
        find_backend(subject.artifact.facts.backend)
    except CapabilityError as error:
        say(f"{subject.name} is not measured here: {error}")
        return False
    return True
