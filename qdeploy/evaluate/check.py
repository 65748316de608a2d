"""The verb ``check``: whether the artifact computes what was calibrated, and whether its quality suffices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.evaluate.baselines import is_baseline
from qdeploy.evaluate.benchmark import benchmark
from qdeploy.evaluate.check_result import CheckResult, judge
from qdeploy.evaluate.comparison import Comparison
from qdeploy.evaluate.metrics.frechet import FOLDER
from qdeploy.evaluate.over_time import describe_before, draw, open_before
from qdeploy.evaluate.parity import measure_parity, open_subject
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.evaluate.thresholds import THRESHOLDS
from qdeploy.model.folder import Model, open_model
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.model.sampling import AS_COLLECTED, Sampling, SamplingOptions, sampled, with_old_names
from qdeploy.parts.plan import Job, named
from qdeploy.parts.run import PLAN_ALONE, check_place
from qdeploy.plots.pictures import picture_folder
from qdeploy.store.artifact import Artifact, EngineFolder
from qdeploy.system.devices import check_device, own_device
from qdeploy.system.errors import UsageError

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
    device: str = "cpu",
    on: str = "here",
    workers: int | None = None,
    worker_cpus: float = 1.0,
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
        device: torch device of the reference and of checkpoints. An engine runs where it was built for.
        on: where parts are made (see `qdeploy.parts.run.made`).
        workers: how many, on Ray.
        worker_cpus: processors for each.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        What was measured, and what of it missed a threshold.

    Raises:
        UsageError: an impossible number, a threshold on what is not measured, no table of corrections, or
            pictures cannot be written.
        InvalidInputError: the subject cannot be checked, or another model is named as reference or was the
            source of ``before``.
        CapabilityError: the runtime that it needs, the device or Ray is not there.
    """
    check_place(on, workers, worker_cpus)
    check_device(device)
    place = {"on": on, "workers": workers, "worker_cpus": worker_cpus}
    given = {
        "min_parity": min_parity,
        "min_sqnr": min_sqnr,
        "min_psnr": min_psnr,
        "min_speedup": min_speedup,
        "max_fd_increase": max_fd_increase,
    }
    changes, keep = with_old_names(dict(options), keep)
    asked = (sampling or AS_COLLECTED).changed(changes)
    plan = QualityPlan(asked, samples, keep)
    model = trajectories.model if trajectories else _model(reference)
    _check_measurable(given, model)
    if correction != "none" and model is None:
        raise UsageError(
            "corrections act on whole trajectories: name the full-precision model with --reference"
        )
    if model is None and on != "here":
        raise UsageError("parts are of images: name the full-precision model with --reference")
    folder = None if pictures is None else picture_folder(pictures)
    own = trajectories.device if trajectories else own_device(device)
    opened = open_subject(subject, own)
    if min_speedup is not None:
        _check_speed_measurable(opened.artifact, min_speedup)
    earlier = None if before is None else open_before(before, opened, own)
    resources = {"features": features, "real": real, "lpips": lpips, "clip": clip}
    comparison = Comparison.of(
        opened, trajectories or model, plan, correction, resources, own, again=before is not None
    )
    if trajectories is None and isinstance(reference, str | Path):
        sizes = {"samples": samples, "keep": keep, "correction": correction, "device": device}
        sources = {
            "reference": reference,
            **resources,
            "onnx": onnx,
            "checkpoint": checkpoint,
            "before": before,
        }
        comparison.arguments = {
            "subject": named(opened.artifact),
            "sampling": asked.arguments_json(),
            **sizes,
            **{name: None if path is None else named(path) for name, path in sources.items()},
            **given,
        }
    if on == PLAN_ALONE:
        comparison.measure(opened, place)
    others = [open_subject(other, own) for other in (onnx, checkpoint) if other is not None]
    parity = measure_parity(opened, others)
    quality = comparison.measure(opened, place)
    speed = None if min_speedup is None or model is None else measure_speed(opened.artifact, model)
    result = judge(opened.artifact, parity, quality, given, speed)
    if earlier is not None:
        compared = replace(comparison, correction="none").measure(earlier, place)
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


def job(**arguments: Any) -> Job:
    """The parts of a call of `check`, by its arguments."""
    device = own_device(arguments["device"])
    opened = open_subject(arguments["subject"], device)
    plan = QualityPlan(arguments["sampling"], arguments["samples"], arguments["keep"])
    resources = {name: arguments[name] for name in ("features", "real", "lpips", "clip")}
    reference = open_model(arguments["reference"])
    return (
        Comparison.of(opened, reference, plan, arguments["correction"], resources, device).parts(opened).job
    )
