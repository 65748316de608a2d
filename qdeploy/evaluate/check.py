"""The verb ``check``: whether the artifact computes what was calibrated, and whether its quality suffices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.evaluate.baselines import is_baseline
from qdeploy.evaluate.benchmark import benchmark
from qdeploy.evaluate.check_result import CheckResult, judge
from qdeploy.evaluate.metric_context import MetricContext
from qdeploy.evaluate.metrics.frechet import FOLDER
from qdeploy.evaluate.metrics.sqnr import summary
from qdeploy.evaluate.over_time import describe_before, draw, open_before
from qdeploy.evaluate.parity import RunnableArtifact, measure_parity, open_subject
from qdeploy.evaluate.quality import QualityPlan, Trajectories, measure_quality
from qdeploy.evaluate.thresholds import THRESHOLDS
from qdeploy.model.folder import Model
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.origin import source_model
from qdeploy.model.sampling import AS_COLLECTED, Sampling, SamplingOptions, sampled, with_old_names
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.plots.pictures import picture_folder
from qdeploy.sampling.correct import check_correction, correct
from qdeploy.store.artifact import Artifact, DenoiserArtifact, EngineFolder
from qdeploy.system.decibels import decibels, powers
from qdeploy.system.errors import InvalidInputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack


@sampled(AS_COLLECTED)
def check(
    subject: str | Path | Artifact,
    sampling: Sampling | None = None,
    *,
    reference: ModelSource | None = None,
    onnx: str | Path | Artifact | None = None,
    checkpoint: str | Path | Artifact | None = None,
    samples: int = 64,
    keep: int = 20,
    min_parity: float | None = None,
    min_sqnr: float | None = None,
    min_psnr: float | None = None,
    min_speedup: float | None = None,
    max_fd_increase: float | None = None,
    correction: str = "none",
    trajectories: Trajectories | None = None,
    before: str | Path | Artifact | None = None,
    pictures: str | Path | None = None,
    features: str | Path | None = None,
    real: str | Path | None = None,
    lpips: str | Path | None = None,
    clip: str | Path | None = None,
    **options: Unpack[SamplingOptions],
) -> CheckResult:
    """Compare an artifact with what it was made from.

    Parity: the subject's outputs for the probe that is stored with it, against those of the fake-quantized
    model. Quality: against the full-precision model, on images that no calibration has used; on the probe
    alone, if no reference is named.

    Args:
        subject: an engine, an ONNX bundle (run by ONNX Runtime) or a checkpoint (run by torch); always an artifact,
            since the probe that parity is measured on is stored with it.
        sampling: how images are sampled; 50 steps of DDIM by default. Its seed chooses the images: they are
            none that a calibration set of an ordinary seed holds.
        reference: the full-precision model, in a folder or in memory.
        onnx: the bundle that an engine was made from, to report parity for each pair of stages.
        checkpoint: the checkpoint that it was made from, for the same purpose.
        samples: images to compare.
        keep: denoiser calls of each trajectory at which predictions are compared.
        min_parity: least parity in dB, the median over the probe's rows. By default 45 for ONNX Runtime and
            torch and 40 for other engines, lowered to what the rounding of activations leaves of it.
        min_sqnr: least median SQNR of the prediction in dB; 20 by default.
        min_psnr: least PSNR of images in dB; no bound by default.
        min_speedup: least number of times as fast as the model's 16-bit engine (float32 where there are no 16 bits),
            measured as `benchmark` does; by default speed is not measured, and the summary says so.
        max_fd_increase: largest increase of FD-local over the reference; no bound by default.
        correction: ``table`` or ``online`` to take mean errors out of predictions when quality is measured, or
            ``none``. Parity is that of the subject itself.
        trajectories: the reference's, if they were recorded before; replaces ``reference`` and the sampling options.
        before: another checkpoint, bundle or engine of the same model, to compare the error by timestep with.
        pictures: folder for ``error.png``, the error by timestep, and ``ranges.png``, how ranges change over
            time; the latter is drawn from the ranges stored with the subject, or else with ``checkpoint``.
        features: a feature network for distances of sets of images: a folder like a zoo model's ``features/``,
            or torch-fidelity's Inception weights. The reference's own by default.
        real: a folder of real images; distances are then to these, else to the reference's images.
        lpips: a folder with LPIPS's weights, see `qdeploy.evaluate.metrics.lpips`.
        clip: folder or Hub id of a CLIP model, for the CLIP score of prompts.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        What was measured, and what of it missed a threshold.

    Raises:
        UsageError: an impossible number, a threshold on what is not measured, no table of corrections, or
            pictures cannot be written.
        InvalidInputError: the subject cannot be checked, or another model is named as reference or was the
            source of ``before``.
        CapabilityError: the runtime that it needs is not installed.
    """
    given = {
        "min_parity": min_parity,
        "min_sqnr": min_sqnr,
        "min_psnr": min_psnr,
        "min_speedup": min_speedup,
        "max_fd_increase": max_fd_increase,
    }
    changes, keep = with_old_names(dict(options), keep)
    plan = QualityPlan((sampling or AS_COLLECTED).changed(changes), samples, keep)
    model = trajectories.model if trajectories else _model(reference)
    _check_measurable(given, model)
    if correction != "none" and model is None:
        raise UsageError(
            "corrections act on whole trajectories: name the full-precision model with --reference"
        )
    folder = None if pictures is None else picture_folder(pictures)
    opened = open_subject(subject)
    if min_speedup is not None:
        _check_speed_measurable(opened.artifact, min_speedup)
    check_correction(correction, opened.artifact)
    plan = replace(plan, sampling=plan.sampling.like(opened.artifact.facts.sampled))
    if model is not None:
        plan = replace(plan, sampling=with_shipped_prompts(plan.sampling, model.path))
    earlier = None if before is None else open_before(before, opened)
    resources = {"features": features, "real": real, "lpips": lpips, "clip": clip}
    context = _metric_context(model, resources, plan.sampling.prompts)
    if model is not None:
        source_model(opened.artifact, model)
        trajectories = trajectories or Trajectories(model, plan)
    others = [open_subject(other) for other in (onnx, checkpoint) if other is not None]
    parity = measure_parity(opened, others)
    quality = _quality(opened, trajectories, opened.artifact, correction, context)
    speed = None if min_speedup is None or model is None else measure_speed(opened.artifact, model)
    result = judge(opened.artifact, parity, quality, given, speed)
    if earlier is not None:
        compared = _quality(earlier, trajectories, opened.artifact, context=context)
        result = replace(result, before=describe_before(earlier, compared))
    if folder is not None:
        result = replace(result, pictures=draw(folder, [opened, *others], quality, result.before))
    return result


def _check_measurable(given: Mapping[str, float | None], model: Model | None) -> None:
    """Refuse bounds on what will not be measured, before any work."""
    lacking = {
        "min_psnr": model is None,
        "min_speedup": model is None,
        "max_fd_increase": model is None or not (model.path / FOLDER).is_dir(),
    }
    for threshold in THRESHOLDS:
        if given[threshold.name] is not None and lacking.get(threshold.name):
            option = f"--{threshold.name.replace('_', '-')}"
            raise UsageError(f"{option} bounds the {threshold.what}, which takes {threshold.needs}")


def _check_speed_measurable(artifact: Artifact, bound: float) -> None:
    """Refuse a bound on speed that cannot be, before any work."""
    if not (bound > 0 and isfinite(bound)):
        raise UsageError(f"the least speed is a positive number of times, not {bound}")
    if not isinstance(artifact, EngineFolder) or is_baseline(artifact):
        raise UsageError(
            "--min-speedup compares an engine that is quantized with the 16-bit one of its model"
        )


def measure_speed(artifact: Artifact, model: Model) -> dict[str, Any]:
    """How many times as fast as its 16-bit engine (float32 where there is none) an engine is on this machine.

    Returns:
        The ratio, its quartiles over interleaved rounds, and what it is to.
    """
    assert isinstance(artifact, EngineFolder)
    measured = benchmark([artifact], reference=model)
    pair = next(reversed(measured.ratios))  # of f32 and 16 bits the latter, where there are both
    return {
        "ratio": measured.ratios[pair],
        "quartiles": measured.spread[pair],
        "baseline": pair.rpartition(" vs ")[2],
    }


def _model(reference: ModelSource | None) -> Model | None:
    return None if reference is None else model_of(reference)


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


def _quality(
    subject: RunnableArtifact,
    trajectories: Trajectories | None,
    probe: DenoiserArtifact,
    correction: str = "none",
    context: MetricContext | None = None,
) -> dict[str, Any]:
    if trajectories is None:
        return _quality_of_probe(subject, probe)
    denoiser = correct(subject.denoiser, correction, subject.artifact, trajectories.scheduler)
    try:
        key = f"{subject.artifact.sha256} {correction}"
        measured = measure_quality(trajectories, denoiser, context, key)
    except InvalidInputError as error:
        raise InvalidInputError(f"{subject.artifact.path} cannot be compared: {error}") from error
    plan = trajectories.plan
    return measured | {
        "source": "trajectory",
        "samples": plan.samples,
        "inference_steps": plan.sampling.steps,
        "scheduler": plan.sampling.scheduler,
        "seed": plan.sampling.seed,
        "correction": correction,
    }


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
