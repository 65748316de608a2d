"""What subjects of a check are compared with: the reference's images, in parts, or the stored probe alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.sqnr import summary
from qdeploy.evaluate.parity import RunnableArtifact
from qdeploy.evaluate.quality import KEPT_BYTES, QualityPlan, Trajectories, measure_in_parts
from qdeploy.evaluate.quality_parts import QualityParts, quality_parts
from qdeploy.model.folder import Model
from qdeploy.model.origin import source_model
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.parts.plan import named
from qdeploy.sampling.correct import check_correction, correct
from qdeploy.store.artifact import DenoiserArtifact
from qdeploy.system.decibels import decibels, powers
from qdeploy.system.errors import InvalidInputError, UsageError


@dataclass
class Comparison:
    """What subjects are compared with, and how.

    Attributes:
        probe: the artifact whose probe is used where there is no reference.
        trajectories: the reference's.
        correction: what takes mean errors out of predictions.
        context: what metrics may use.
        arguments: of `check`, in JSON's types; None where other processes cannot open them.
    """

    probe: DenoiserArtifact
    trajectories: Trajectories | None
    correction: str
    context: MetricContext | None
    arguments: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        subject: RunnableArtifact,
        reference: Trajectories | Model | None,
        plan: QualityPlan,
        correction: str,
        resources: dict[str, str | Path | None],
        device: str,
        again: bool = False,
    ) -> Comparison:
        """The comparison that is asked for, checked before any work.

        Args:
            subject: what is compared.
            reference: with what.
            plan: what is sampled.
            correction: what takes mean errors out of predictions.
            resources: of metrics, by name.
            device: torch device.
            again: whether another subject is compared with the same reference: its trajectories are kept.
        """
        check_correction(correction, subject.artifact)
        model = reference.model if isinstance(reference, Trajectories) else reference
        plan = replace(plan, sampling=plan.sampling.like(subject.artifact.facts.sampled))
        if model is not None:
            plan = replace(plan, sampling=with_shipped_prompts(plan.sampling, model.path))
        context = _metric_context(model, resources, plan.sampling.prompts)
        if model is not None:
            source_model(subject.artifact, model)
        kept = KEPT_BYTES if again else 0
        found = Trajectories(reference, plan, device, kept) if isinstance(reference, Model) else reference
        return cls(subject.artifact, found, correction, context)

    def parts(self, subject: RunnableArtifact) -> QualityParts:
        """The parts of the comparison with one subject."""
        assert self.trajectories is not None
        assert self.context is not None
        denoiser = correct(subject.denoiser, self.correction, subject.artifact, self.trajectories.scheduler)
        key = f"{subject.artifact.sha256} {self.correction}"
        arguments = self.arguments and {
            **self.arguments,
            "subject": named(subject.artifact),
            "correction": self.correction,
        }
        return quality_parts(self.trajectories, denoiser, self.context, key, arguments, subject.artifact.path)

    def measure(self, subject: RunnableArtifact, place: Mapping[str, Any]) -> dict[str, Any]:
        """The quality of a subject, from parts that are made at a place."""
        if self.trajectories is None:
            return _quality_of_probe(subject, self.probe)
        try:
            measured = measure_in_parts(self.parts(subject), **place)
        except InvalidInputError as error:
            raise InvalidInputError(f"{subject.artifact.path} cannot be compared: {error}") from error
        plan = self.trajectories.plan
        return measured | {
            "source": "trajectory",
            "samples": plan.samples,
            "inference_steps": plan.sampling.steps,
            "scheduler": plan.sampling.scheduler,
            "seed": plan.sampling.seed,
            "correction": self.correction,
        }


def _metric_context(
    model: Model | None, given: dict[str, str | Path | None], prompts: Sequence[str] | None
) -> MetricContext | None:
    """What metrics may use, checked before any work."""
    named = next((name for name, value in given.items() if value is not None), None)
    if model is None:
        if named:
            raise UsageError(
                f"--{named} is used to measure the quality of images: name the full-precision model too"
            )
        return None
    context = MetricContext(model, **given, prompts=prompts)
    context.check()
    return context


def _quality_of_probe(subject: RunnableArtifact, probe: DenoiserArtifact) -> dict[str, Any]:
    """SQNR on a probe's rows, all that can be measured without the full-precision model."""
    inputs, reference, _ = probe.probe()
    output = subject.predict(inputs)
    sums: dict[float, tuple[float, float]] = {}
    for row, t in enumerate(inputs["timestep"].flatten().tolist()):
        before, now = sums.get(t, (0.0, 0.0)), powers(output[row], reference[row])
        sums[t] = (before[0] + now[0], before[1] + now[1])
    by_timestep = summary({t: decibels(*both) for t, both in sums.items()})
    return {"sqnr_db": by_timestep, "source": "probe", "samples": len(output)}
