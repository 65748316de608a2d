"""The content of a report, before it becomes a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdeploy.evaluate.report_page.subjects import Given, Subject
from qdeploy.mixed.ranking import LayerHarm
from qdeploy.model.folder import Model
from qdeploy.quant.time_ranges import read_ranges, tensor_names
from qdeploy.store.artifact import CalibrationFolder, DenoiserArtifact, EngineFolder, Samples

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Content:
    """The named artifacts and all measurements.

    Attributes:
        given: the artifacts.
        model: the full-precision model, if it is available.
        checks: results of ``check`` by subject.
        speed: the result of ``benchmark``.
        layers: errors by layer, by subject.
        kernels: times by type of kernel, by the engine's name in ``speed``.
        samples: images of full precision, and of subjects.
        sensitivity: the ranking of layers.
        pictures: how many seeds to show.
    """

    given: Given
    model: Model | None
    checks: dict[str, dict[str, Any]]
    speed: dict[str, Any] | None
    layers: dict[str, dict[str, Any]]
    kernels: dict[str, dict[str, Any]]
    samples: tuple[Samples | None, dict[str, Samples]]
    sensitivity: list[LayerHarm] | None
    pictures: int

    @property
    def passed(self) -> bool | None:
        """Whether every check passed; None if there is none."""
        return all(check["passed"] for check in self.checks.values()) if self.checks else None

    @property
    def title(self) -> str:
        """What the page is about."""
        first = self.given.subjects[0].artifact
        return self.model.path.resolve().name if self.model else first.facts.class_name

    def described(self) -> list[tuple[Subject, str]]:
        """The subjects with a line on each."""
        return [(subject, describe(subject)) for subject in self.given.subjects]

    def timed(self) -> list[dict[str, Any]]:
        """The benchmark's entries at the largest batch."""
        if self.speed is None:
            return []
        batch = max(result["batch"] for result in self.speed["results"])
        return [result for result in self.speed["results"] if result["batch"] == batch]

    def time_of(self, subject: Subject) -> dict[str, Any] | None:
        """The benchmark's entry of a subject, at the largest batch."""
        sha256 = subject.artifact.sha256
        return next((result for result in self.timed() if result["sha256"] == sha256), None)

    def ratios(self, result: Mapping[str, Any]) -> dict[str, tuple[float, list[float] | None]]:
        """How many times as fast as each baseline an entry is, with the quartiles over rounds."""
        assert self.speed is not None
        several = len({other["batch"] for other in self.speed["results"]}) > 1
        suffix = f", batch {result['batch']}" if several else ""
        start, spread = f"{result['name']} vs ", self.speed.get("ratios_quartiles", {})
        return {
            name.removeprefix(start).removesuffix(suffix): (ratio, spread.get(name))
            for name, ratio in self.speed["ratios"].items()
            if name.startswith(start) and name.endswith(suffix)
        }

    def by_timestep(self, metric: str) -> dict[str, dict[float, float]]:
        """A metric's values by timestep, by subject; also of the artifact that a check compared with."""
        curves: dict[str, dict[float, float]] = {}
        for name, check in self.checks.items():
            found = {name: check["quality"].get(metric)}
            if check.get("before"):
                found[f"{name}, before"] = check["before"].get(metric)
            for label, summary in found.items():
                if isinstance(summary, Mapping) and summary.get("by_timestep"):
                    curves[label] = {float(t): value for t, value in summary["by_timestep"].items()}
        return curves

    def ranges(self) -> dict[str, dict[str, Tensor]]:
        """Ranges over time by where they come from, each only once."""
        found: dict[str, dict[str, Tensor]] = {}
        seen: set[str] = set()
        for name, artifact in self._carriers():
            file = artifact.ranges
            if file is None:
                continue
            sha256 = artifact.files[file.relative_to(artifact.path).as_posix()]
            if sha256 in seen:
                continue
            seen.add(sha256)
            ranges = read_ranges(artifact)
            if ranges is not None and tensor_names(ranges) and len(ranges["timesteps"]):
                found[name] = dict(ranges)
        return found

    def _carriers(self) -> Iterator[tuple[str, CalibrationFolder | DenoiserArtifact]]:
        for subject in self.given.subjects:
            for artifact in (subject.artifact, *subject.before.values()):
                yield subject.name, artifact
        for data in self.given.sets:
            yield data.path.name, data

    def missing(self) -> list[str]:
        """What is not shown, and how to add it."""
        lacking = []
        if self.model is None:
            lacking.append(
                "paired quality, speed and pictures: name the full-precision model with --reference"
            )
        elif self.speed is None:
            lacking.append("speed: name an engine that this machine can run")
        if self.model is not None and self.samples[0] is None and self.pictures:
            lacking.append("pictures: name folders of samples of the model too, or a model with its pipeline")
        if not self.layers:
            lacking.append("the error by layer: name the checkpoint, and the model with --reference")
        if not self.ranges():
            lacking.append("ranges over time: name the checkpoint or the calibration set")
        if self.sensitivity is None:
            lacking.append("the ranking of layers: name what `qdeploy sensitivity` wrote with --sensitivity")
        return lacking


def describe(subject: Subject) -> str:
    """Formats, method and runtime of a subject in a few words."""
    artifact, recipe = subject.artifact, subject.artifact.recipe or {}
    if isinstance(artifact, EngineFolder):
        facts = artifact.facts
        runtime = f"{facts.backend} {facts.backend_version.split('-')[0]}, {facts.engine_precision}"
    else:
        runtime = {"checkpoint": "simulated in torch", "onnx": "ONNX"}[artifact.kind]
    precision = "nothing quantized" if subject.is_baseline else artifact.facts.precision
    return " · ".join(str(part) for part in (precision, recipe.get("method"), runtime) if part)
