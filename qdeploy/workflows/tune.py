"""The verb ``tune``: scheduler, steps, precision and placement, by measured quality and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.model.folder import open_model
from qdeploy.model.sampling import COLLECTING, Sampling, SamplingOptions, sampled
from qdeploy.model.schedulers import make_scheduler
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.store.files import explained_os_errors, write_json
from qdeploy.system.errors import CheckFailed, InvalidInputError, UsageError
from qdeploy.system.progress import say, track
from qdeploy.system.tables import Table
from qdeploy.workflows.auto_steps import Steps, check_bound, engine_for
from qdeploy.workflows.tune_steps import FLOAT, INT8, PLACED, WITH_DECODER, Bench, Trial

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCHEDULERS = ("ddim", "dpm++", "unipc")
STEPS = (4, 6, 8, 12, 16, 20, 24, 32)
_KEPT = 4  # schedules that quantized engines are tried with
DEFAULT = replace(COLLECTING, steps=50)


@dataclass(frozen=True)
class TuneResult:
    """What `tune` measured.

    Attributes:
        output: the folder of everything that was made.
        min_psnr: the bound, in dB.
        trials: everything that was tried.
        chosen: the fastest that meets the bound, or else the one with the best images.
    """

    output: Path
    min_psnr: float
    trials: tuple[Trial, ...]
    chosen: Trial

    @property
    def passed(self) -> bool:
        """Whether the bound is met."""
        return self.chosen.psnr_db >= self.min_psnr

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """Trials that no other is both faster and better than, the fastest first."""
        return frontier(self.trials)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy tune --json``."""
        return {
            "path": str(self.output),
            "min_psnr": self.min_psnr,
            "passed": self.passed,
            "chosen": asdict(self.chosen),
            "frontier": [asdict(each) for each in self.frontier],
            "trials": [asdict(each) for each in self.trials],
        }

    def table(self) -> str:
        """The frontier and the choice, for people."""
        rows = [
            [
                each.form,
                each.scheduler,
                str(each.steps),
                f"{each.psnr_db:.1f}",
                f"{each.seconds:.3f}",
                "<-" if each == self.chosen else "",
            ]
            for each in self.frontier
        ]
        table = Table(["engine", "scheduler", "steps", "PSNR dB", "s an image", ""], rows).text()
        best = self.chosen
        verdict = (
            f"the fastest of {len(self.trials)} trials with {self.min_psnr:g} dB"
            if self.passed
            else f"nothing reaches {self.min_psnr:g} dB; nearest of {len(self.trials)} trials"
        )
        use = f"qdeploy sample {best.engine} --scheduler {best.scheduler} --steps {best.steps}"
        return f"{table}\n{verdict}: {use}"


@sampled(DEFAULT)
def tune(
    model: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    min_psnr: float = 35.0,
    schedulers: Sequence[str] = SCHEDULERS,
    try_steps: Sequence[int] = STEPS,
    reference_steps: int = 100,
    backend: str = "auto",
    calibration_samples: int = 16,
    samples: int = 8,
    effort: str = "fast",
    **options: Unpack[SamplingOptions],
) -> TuneResult:
    """Find the fastest way to images that are close enough to full precision with many steps.

    An engine in float is tried with every scheduler and number of steps; the best schedules then with int8, with
    int8 where it is measured to pay, and with the decoder in int8. Everything is kept in the output folder, so
    that a run that was stopped goes on.

    Args:
        model: a diffusers pipeline's folder, a shipped model's name or a Hub id.
        output: folder of everything that is made.
        sampling: how images are sampled for calibration; prompts where the pipeline takes them. Trials have
            schedulers and steps of their own.
        min_psnr: least PSNR of images to the reference's on the same seeds, in dB.
        schedulers: to try: names of `qdeploy.model.schedulers`. Those that add noise of their own (ddpm,
            euler-ancestral) make other images from the same seed.
        try_steps: numbers of steps to try.
        reference_steps: steps of the reference, with the model's own scheduler in torch.
        backend: the engine to build for; ``auto`` for the fastest that is installed.
        calibration_samples: images to calibrate on.
        samples: images to compare, from other seeds.
        effort: of the calibration: ``fast``, ``balanced``, ``thorough`` or ``best``.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        All trials, their frontier and the choice. If nothing meets the bound, the best images are chosen and
        `TuneResult.passed` is false.

    Raises:
        UsageError: an impossible bound or number, an unknown scheduler, missing prompts.
        CapabilityError: the backend is not installed.
        InvalidInputError: the model cannot be used.
    """
    _check(min_psnr, schedulers, try_steps, reference_steps, samples, calibration_samples)
    name, precision, _ = engine_for(backend)
    source = open_model(model)
    asked = with_shipped_prompts((sampling or DEFAULT).changed(dict(options)), source.path)
    for each in schedulers:
        make_scheduler(each, source.scheduler())
    work = Steps(
        source, Path(output), name, precision, asked,
        calibration_samples, samples, min_psnr, effort, rounds=1,
    )  # fmt: skip
    schedules = [(scheduler, steps) for scheduler in schedulers for steps in sorted(set(try_steps))]
    calls = samples * (reference_steps + sum(steps for _, steps in schedules))
    say(
        f"{len(schedules)} schedules in float and up to {3 * _KEPT} trials in int8, {samples} images each: "
        f"about {calls} steps of the denoiser, and those of the calibration"
    )
    with explained_os_errors(work.output):
        (work.output / "measured").mkdir(parents=True, exist_ok=True)
    bench = Bench(work, reference_steps)
    reference = bench.reference()
    trials = bench.trials(FLOAT, schedules, reference, iter(track([None] * len(schedules), "in float")))
    kept = [(each.scheduler, each.steps) for each in promising(trials, min_psnr)]
    for form in (INT8, PLACED, WITH_DECODER):
        if form == WITH_DECODER and not bench.has_decoder():
            continue
        try:
            trials += bench.trials(form, kept, reference, iter(track([None] * len(kept), form)))
        except (CheckFailed, InvalidInputError) as error:
            if form == INT8:
                raise
            say(f"{form} is left out: {error}")
    good = [each for each in trials if each.psnr_db >= min_psnr]
    chosen = min(good, key=lambda each: each.seconds) if good else max(trials, key=lambda each: each.psnr_db)
    result = TuneResult(work.output, min_psnr, tuple(trials), chosen)
    write_json(work.output / "tune.json", result.to_json())
    return result


def frontier(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Trials that no other is both at least as fast and better than, the fastest first."""
    found: list[Trial] = []
    for each in sorted(trials, key=lambda each: (each.seconds, -each.psnr_db)):
        if not found or each.psnr_db > found[-1].psnr_db:
            found.append(each)
    return tuple(found)


def promising(trials: Sequence[Trial], min_psnr: float) -> list[Trial]:
    """Schedules for quantized engines: the fastest few of the frontier that meet the bound, or its best one.

    Quantization takes from the PSNR of a schedule, so that those below the bound in float are left out.
    """
    best = frontier(trials)
    return [each for each in best if each.psnr_db >= min_psnr][:_KEPT] or [best[-1]]


def _check(
    min_psnr: float,
    schedulers: Sequence[str],
    try_steps: Sequence[int],
    reference_steps: int,
    samples: int,
    calibration_samples: int,
) -> None:
    check_bound(min_psnr)
    if not schedulers or not try_steps:
        raise UsageError("tune tries one scheduler or more, with one number of steps or more")
    for name, least in (("steps", min(try_steps)), ("reference steps", reference_steps)):
        if least < 1:
            raise UsageError(f"{name} must be at least 1, not {least}")
    if reference_steps < max(try_steps):
        raise UsageError(
            f"the reference takes {reference_steps} steps, fewer than the {max(try_steps)} that are tried: "
            "raise --reference-steps"
        )
    if min(samples, calibration_samples) < 1:
        raise UsageError("tune needs at least one image to calibrate on, and one to compare")
