"""The verb ``auto``: from a model to a checked, measured engine and its report, by one command.

It runs the other verbs in their order, `preflight` first. A ladder of recipes, the fastest engine first, is climbed
until one meets the bound on quality. Every step is an ordinary artifact in the output folder, so that an interrupted
run continues, and each can be made or changed by hand: `commands` lists what to type for that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from qdeploy.evaluate.ratios import in_words
from qdeploy.model.folder import open_model
from qdeploy.model.sampling import COLLECTING, Sampling, SamplingOptions, sampled, with_old_names
from qdeploy.model.zoo import with_shipped_prompts
from qdeploy.sampling.pipeline_folder import is_pipeline_folder
from qdeploy.store.artifact import EngineFolder
from qdeploy.store.files import explained_os_errors, write_json
from qdeploy.system.progress import say
from qdeploy.workflows.auto_steps import KEEP, Rung, Steps, check_bound, engine_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT = replace(COLLECTING, steps=50)


@dataclass(frozen=True)
class Attempt:
    """What one recipe came to.

    Attributes:
        recipe: the preset.
        engine: the engine's folder.
        psnr_db: PSNR of its images to those of full precision on the same seeds.
        sqnr_db: SQNR of its predictions, the median over timesteps.
        failures: what missed a bound, a sentence each; empty if nothing did.
    """

    recipe: str
    engine: Path
    psnr_db: float
    sqnr_db: float
    failures: tuple[str, ...]


@dataclass(frozen=True)
class AutoResult:
    """What `auto` made.

    Attributes:
        output: the folder of everything.
        chosen: the first attempt that met the bounds, or else the one with the best images.
        attempts: all of them, in the order in which they were made.
        speed: the result of ``benchmark``, as JSON values.
        report: the HTML file.
        pipeline: whether the chosen engine's folder is a whole pipeline, which `load_pipeline` opens.
    """

    output: Path
    chosen: Attempt
    attempts: tuple[Attempt, ...]
    speed: dict[str, Any]
    report: Path
    pipeline: bool = False

    @property
    def passed(self) -> bool:
        """Whether the bounds are met."""
        return not self.chosen.failures

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy auto --json``."""

        def shown(attempt: Attempt) -> dict[str, Any]:
            return {**asdict(attempt), "engine": str(attempt.engine), "failures": list(attempt.failures)}

        return {
            "path": str(self.output),
            "passed": self.passed,
            "engine": str(self.chosen.engine),
            "pipeline": self.pipeline,
            "chosen": shown(self.chosen),
            "attempts": [shown(attempt) for attempt in self.attempts],
            "benchmark": self.speed,
            "report": str(self.report),
        }

    def as_text(self) -> str:
        """The result for people: quality, speed, and how to use the engine."""
        lines = [
            f"{attempt.recipe}: PSNR {attempt.psnr_db:.1f} dB, SQNR {attempt.sqnr_db:.1f} dB, "
            + ("; ".join(attempt.failures) or "within the bounds")
            for attempt in self.attempts
        ]
        quartiles = self.speed["ratios_quartiles"]
        lines += [
            f"speed, {pair}: {in_words(ratio, quartiles[pair])}"
            for pair, ratio in self.speed["ratios"].items()
        ]
        name = "pipeline" if self.pipeline else "engine"
        name = name if self.passed else f"best {name}, which misses the bounds"
        opener = "load_pipeline" if self.pipeline else "load_engine"
        lines += [
            f"{name}: {self.chosen.engine}",
            f'in Python: qdeploy.{opener}("{self.chosen.engine}")',
            f"everything on one page: {self.report}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class AutoCommands:
    """The commands that `auto` stands for."""

    commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy auto --explain --json``."""
        return {"commands": list(self.commands)}

    def as_text(self) -> str:
        """One command a line."""
        return "\n".join(self.commands)

    @property
    def passed(self) -> bool:
        """Nothing was measured, so nothing missed a bound."""
        return True


@overload
def auto(
    model: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    backend: str = "auto",
    min_psnr: float = 35.0,
    calibration_samples: int = 32,
    samples: int = 32,
    effort: str = "fast",
    rounds: int = 30,
    explain: Literal[False] = False,
    **options: Unpack[SamplingOptions],
) -> AutoResult: ...


@overload
def auto(
    model: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    backend: str = "auto",
    min_psnr: float = 35.0,
    calibration_samples: int = 32,
    samples: int = 32,
    effort: str = "fast",
    rounds: int = 30,
    explain: Literal[True],
    **options: Unpack[SamplingOptions],
) -> AutoCommands: ...


@sampled(DEFAULT)
def auto(
    model: str | Path,
    output: str | Path,
    sampling: Sampling | None = None,
    *,
    backend: str = "auto",
    min_psnr: float = 35.0,
    calibration_samples: int = 32,
    samples: int = 32,
    effort: str = "fast",
    rounds: int = 30,
    explain: bool = False,
    **options: Unpack[SamplingOptions],
) -> AutoResult | AutoCommands:
    """Make the fastest engine whose images are close enough to full precision, and prove both.

    Args:
        model: a diffusers pipeline's folder, a shipped model's name or a Hub id.
        output: folder of everything that is made.
        sampling: how images are sampled, for calibration and for checks; prompts where the pipeline takes them.
        backend: the engine to build for; ``auto`` for the fastest that is installed.
        min_psnr: least PSNR of images to those of full precision on the same seeds, in dB.
        calibration_samples: images to calibrate on.
        samples: images to check on, from other seeds.
        effort: of calibrations: ``fast``, ``balanced``, ``thorough`` or ``best``.
        rounds: interleaved rounds of the benchmark.
        explain: return the commands that this stands for, and do nothing. Those of later recipes are needed only
            where earlier ones miss the bound.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Returns:
        The chosen engine, all attempts, speed and report. If no recipe meets the bound, the best one is chosen and
        `AutoResult.passed` is false.

    Raises:
        UsageError: an impossible bound or number, missing prompts, a backend without a ladder.
        CapabilityError: the backend is not installed.
        InvalidInputError: the model cannot be used.
    """
    check_bound(min_psnr)
    name, precision, ladder = engine_for(backend)
    changes, _ = with_old_names(dict(options), KEEP)
    source = open_model(model)
    asked = with_shipped_prompts((sampling or DEFAULT).changed(changes), source.path)
    run = Steps(
        source, Path(output), name, precision, asked,
        calibration_samples, samples, min_psnr, effort, rounds,
    )  # fmt: skip
    if explain:
        return AutoCommands(tuple(run.commands(ladder)))
    run.preflight()
    with explained_os_errors(run.output):
        run.output.mkdir(parents=True, exist_ok=True)
    data = run.collect()
    attempts: list[Attempt] = []
    engines: list[EngineFolder] = []
    checks: list[dict[str, Any]] = []
    for rung in ladder:
        say(f"{rung.recipe}, for {run.backend} with {run.precision}")
        engines.append(run.engine(rung, data))
        checks.append(run.check(engines[-1]))
        attempts.append(_attempt(rung, engines[-1], checks[-1]))
        if not attempts[-1].failures:
            break
    chosen = next(
        (each for each in attempts if not each.failures), max(attempts, key=lambda each: each.psnr_db)
    )
    speed = run.benchmark(engines)
    page = run.report(engines, checks, speed)
    whole = is_pipeline_folder(engines[attempts.index(chosen)])
    result = AutoResult(run.output, chosen, tuple(attempts), speed, page, whole)
    write_json(run.output / "auto.json", result.to_json())
    return result


def _attempt(rung: Rung, engine: EngineFolder, check: dict[str, Any]) -> Attempt:
    quality = check["quality"]
    return Attempt(
        rung.recipe,
        engine.path,
        float(quality["psnr_db"]),
        float(quality["sqnr_db"]["median"]),
        tuple(check["failures"]),
    )
