"""The steps of ``auto``: other verbs with their arguments, and the commands that one would type for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qdeploy.engines.registry import find_backend
from qdeploy.evaluate.baselines import FULL, HALF
from qdeploy.evaluate.cached_json import cached_result
from qdeploy.model.folder import Model
from qdeploy.model.sampling import CHECKING, Sampling
from qdeploy.store.artifact import Bundle, CalibrationFolder, Checkpoint, EngineFolder
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import has_bf16, int8_sums_saturate, machine


@dataclass(frozen=True)
class Rung:
    """One recipe of a ladder.

    Attributes:
        recipe: a preset.
        target: what the result must run on, where it is not the preset's own.
    """

    recipe: str
    target: str | None = None


KEEP = 20  # denoiser calls of a trajectory

# By backend, the fastest engine first. Weights alone come last: they keep nearly everything of the pictures, and
# save memory more than time.
LADDERS = {
    "openvino": (Rung("w8a8-minmax-cpu"), Rung("w8a8-qdiffusion", "openvino"), Rung("w8-weights")),
    "onnxruntime": (
        Rung("w8a8-minmax", "onnxruntime"),
        Rung("w8a8-qdiffusion", "onnxruntime"),
        Rung("w8-weights"),
    ),
    "tensorrt": (Rung("w8a8-minmax", "tensorrt"), Rung("w8a8-qdiffusion", "tensorrt")),
}


@dataclass(frozen=True)
class Steps:
    """The verbs with their arguments; each takes up what an earlier run has finished."""

    model: Model
    output: Path
    backend: str
    precision: str
    sampling: Sampling
    calibration_samples: int
    samples: int
    min_psnr: float
    effort: str
    rounds: int

    @property
    def keep(self) -> int:
        """Denoiser calls of each trajectory to calibrate and to check on."""
        return min(KEEP, self.sampling.steps)

    def preflight(self) -> None:
        """Try everything once before hours are spent; an earlier run that got further has tried it."""
        from qdeploy.workflows.preflight import preflight

        if self.output.exists():
            return
        preflight(self.model, self.sampling).require()

    def collect(self) -> CalibrationFolder:
        from qdeploy.calibration_set.collect import collect

        sampling = replace(self.sampling, seed=0)
        return collect(
            self.model, self.output / "set", sampling, keep=self.keep, samples=self.calibration_samples
        )

    def engine(self, rung: Rung, data: CalibrationFolder) -> EngineFolder:
        from qdeploy.engines.build import build_engine
        from qdeploy.export.run import export
        from qdeploy.workflows.calibrate import calibrate

        checkpoint = calibrate(
            self.model.path,
            self.output / rung.recipe,
            recipe=rung.recipe,
            target=rung.target,
            weights=self.weights(rung),
            effort=self.effort,
            calibration=data,
        )
        assert isinstance(checkpoint, Checkpoint)
        bundle: Bundle = export(checkpoint, self.output / f"{rung.recipe}-onnx")
        place = self.output / f"{rung.recipe}-engine"
        # The check that follows judges it, and names the next rung.
        return build_engine(
            bundle, place, backend=self.backend, precision=self.precision, allow_inaccurate=True
        )

    def weights(self, rung: Rung) -> str | None:
        """Seven bits where eight could overflow this processor's sums; the preset's own elsewhere."""
        narrow = self.backend == "openvino" and int8_sums_saturate()
        return "int7" if narrow and rung.recipe.startswith("w8a8") else None

    def check(self, engine: EngineFolder) -> dict[str, Any]:
        from qdeploy.evaluate.check import check
        from qdeploy.evaluate.metrics.base import code_of_metrics

        sampling = replace(self.sampling, seed=CHECKING.seed)

        def measure() -> dict[str, Any]:
            return check(
                engine,
                sampling,
                reference=self.model,
                samples=self.samples,
                keep=self.keep,
                min_psnr=self.min_psnr,
            ).to_json()

        code = code_of_metrics()
        key = [
            engine.sha256,
            self.model.sha256,
            repr(sampling),
            self.samples,
            self.min_psnr,
            *([code] if code else []),
        ]
        return cached_result(self.output / "measured" / f"check-{engine.path.name}.json", key, measure)

    def benchmark(self, engines: list[EngineFolder]) -> dict[str, Any]:
        from qdeploy.evaluate.benchmark import benchmark

        key = [[engine.sha256 for engine in engines], self.rounds, machine()]
        measure = partial(benchmark, engines, reference=self.model, rounds=self.rounds)
        return cached_result(self.output / "measured" / "benchmark.json", key, lambda: measure().to_json())

    def report(
        self, engines: list[EngineFolder], checks: list[dict[str, Any]], speed: dict[str, Any]
    ) -> Path:
        from qdeploy.evaluate.report_page.run import report

        sampling = replace(self.sampling, seed=CHECKING.seed)
        return report(
            engines,
            self.output / "report.html",
            sampling,
            reference=self.model,
            checks=checks,
            benchmark=speed,
            samples=self.samples,
            folder=self.output / "measured",
        ).path

    def commands(self, ladder: tuple[Rung, ...]) -> Iterator[str]:
        """What to type for the same."""
        source, out = self.model.path, self.output
        asked = ["--steps", str(self.sampling.steps)]
        if self.sampling.scheduler:
            asked += ["--scheduler", self.sampling.scheduler]
        if self.sampling.guidance is not None:
            asked += ["--guidance", str(self.sampling.guidance)]
        for flag, texts in (
            ("--prompt", self.sampling.prompts),
            ("--negative-prompt", self.sampling.negative_prompts),
        ):
            asked += [word for text in texts or () for word in (flag, text)]
        amount = ["--samples", str(self.calibration_samples), "--keep", str(self.keep)]
        yield _line("preflight", source, *asked)
        yield _line("collect", source, "-o", out / "set", *amount, *asked)
        for rung in ladder:
            name = out / rung.recipe
            how = ["--target", rung.target] if rung.target else []
            how += ["--weights", weights] if (weights := self.weights(rung)) else []
            fitted = ["--calibration", out / "set", "--effort", self.effort]
            yield _line("calibrate", source, "-o", name, "-r", rung.recipe, *how, *fitted)
            yield _line("export", name, "-o", f"{name}-onnx")
            how = ["--backend", self.backend, "--precision", self.precision]
            yield _line("build-engine", f"{name}-onnx", "-o", f"{name}-engine", *how)
            bound = [
                "--samples",
                str(self.samples),
                "--keep",
                str(self.keep),
                "--min-psnr",
                str(self.min_psnr),
            ]
            yield _line("check", f"{name}-engine", "--reference", source, *bound, *asked)
        engine = f"{out / ladder[0].recipe}-engine"
        yield _line("benchmark", engine)
        yield _line("report", engine, "--reference", source, "-o", out / "report.html", *asked)


def check_bound(min_psnr: float) -> None:
    """Make sure that images can have this PSNR.

    Raises:
        UsageError: it is no number of dB from 0 to 100.
    """
    if not 0 < min_psnr <= 100:
        raise UsageError(f"the least PSNR of images is a number of dB from 0 to 100, not {min_psnr}")


def engine_for(backend: str) -> tuple[str, str, tuple[Rung, ...]]:
    """A backend's name, the fastest precision that it has here for what is not integer, and its ladder."""
    chosen = find_backend(backend)
    if chosen.name not in LADDERS:
        raise UsageError(f"auto builds for {', '.join(LADDERS)}, not for {chosen.name}: use build-engine")
    half = "f16" if chosen.device != "cpu" else HALF if has_bf16() else FULL
    return chosen.name, half if half in chosen.precisions else FULL, LADDERS[chosen.name]


def _line(*words: object) -> str:
    return shlex.join(["qdeploy", *map(str, words)])
