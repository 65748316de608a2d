"""The verb ``demo``: the whole workflow on a model that is shipped with the package.

Every stage is an artifact or a cached result in the output folder, so that an interrupted demo continues, and
a finished one returns at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from qdeploy.engines.registry import find_backend
from qdeploy.evaluate.baselines import FULL, HALF, baseline_engine, baseline_precisions
from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.image_grid import image_grid
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.evaluate.summary import DemoResult, engine_table, summary_notes
from qdeploy.model.folder import Model, open_model
from qdeploy.model.sampling import CHECKING, Sampling
from qdeploy.store.artifact import Artifact, Bundle, CalibrationFolder, Checkpoint, EngineFolder, Samples
from qdeploy.store.files import explained_os_errors, write_json, write_text
from qdeploy.system.machine import int8_sums_saturate, machine
from qdeploy.system.progress import say, verbosity

T = TypeVar("T")
A = TypeVar("A", bound=Artifact)

STEPS = 50  # of DDIM, for calibration, images and checks
IMAGES, FIRST_IMAGE = 32, 1000  # of the picture; the calibration set holds seeds 0 to 63
BATCH = 16  # samples per call whose speed is reported
THREADS = 1  # the model is too small to gain from more, and a busy second core would blur the times


@dataclass(frozen=True)
class Variant:
    """A quantized model of the demo.

    Attributes:
        title: for the table.
        recipe: the preset.
        weights: their format, where it is not the preset's.
    """

    title: str
    recipe: str
    weights: str | None = None


def variants() -> dict[str, Variant]:
    """The models of the demo by folder name; weights of eight bits have seven where int8 sums would overflow."""
    narrow = int8_sums_saturate()
    eight = Variant(f"8-bit (W{7 if narrow else 8}A8)", "w8a8-minmax", "int7" if narrow else None)
    return {"w8a8": eight, "w4a8": Variant("4-bit (W4A8)", "w4a8-qdiffusion")}


def demo(
    output: str | Path = "qdeploy-demo",
    *,
    model: str | Path = "digits",
    backend: str = "auto",
    samples: int = 96,
    rounds: int = 30,
) -> DemoResult:
    """Collect, calibrate to 8 and 4 bits, export, build engines, sample, check and benchmark.

    Args:
        output: folder of everything that is made: artifacts, ``grid.png``, ``table.md``,
            ``results.json``, ``report.html``.
        model: an unconditional model.
        backend: of the engines.
        samples: images that quality is measured on.
        rounds: turns of each engine in the benchmark.

    Returns:
        The table and what it was made from.

    Raises:
        UsageError: the output folder holds something else.
        CapabilityError: the backend is not installed.
    """
    work = DemoRun(Path(output), open_model(model), find_backend(backend).name, samples, rounds)
    say(f"{work.model.path.name}: about five minutes on two cores; everything is written to {work.output}/")
    with explained_os_errors(work.output):
        work.output.mkdir(parents=True, exist_ok=True)
    with _one_torch_thread():
        engines = work.build()
        work.picture(engines)
        checks = work.check(engines)
    speed = work.benchmark(engines)
    titles = {FULL: "full precision", HALF: "16-bit"}
    titles |= {name: variant.title for name, variant in work.variants.items()}
    page = work.report(checks, speed)
    table = engine_table(engines, titles, checks, speed, BATCH)
    notes = [
        *summary_notes(checks, speed),
        f"images of the same seeds: {work.output / 'grid.png'}",
        f"everything on one page: {page}",
    ]
    result = DemoResult(work.output, table, work.stages, checks, speed, notes)
    write_json(work.output / "results.json", result.to_json())
    write_text(work.output / "table.md", result.markdown())
    return result


@dataclass
class DemoRun:
    """The stages of the demo in one output folder. Each takes up what an earlier run has finished."""

    output: Path
    model: Model
    backend: str
    samples: int
    rounds: int
    variants: dict[str, Variant] = field(default_factory=variants)
    stages: dict[str, float] = field(default_factory=dict)

    def build(self) -> dict[str, EngineFolder]:
        """The engines: ``f32`` and ``bf16`` as baselines, and one for each variant."""
        from qdeploy.calibration_set.collect import collect
        from qdeploy.engines.build import build_engine
        from qdeploy.export.run import export
        from qdeploy.workflows.calibrate import calibrate

        source = self.model.path
        data = self._make(
            "collect",
            CalibrationFolder,
            partial(
                collect, source, self.output / "set", Sampling(steps=STEPS, scheduler="ddim", batch=BATCH)
            ),
        )
        checkpoints = {
            name: self._make(
                f"calibrate {name}",
                Checkpoint,
                partial(
                    calibrate,
                    source,
                    self.output / name,
                    recipe=variant.recipe,
                    weights=variant.weights,
                    effort="fast",
                    calibration=data,
                ),
            )
            for name, variant in self.variants.items()
        }
        bundles = {
            name: self._make(f"export {name}", Bundle, partial(export, made, self.output / f"{name}-onnx"))
            for name, made in checkpoints.items()
        }
        kinds = baseline_precisions(self.backend)
        # What is not int8 is computed in 16 bits where the processor can: the rival does so too.
        how: dict[str, Any] = {"backend": self.backend, "precision": HALF if HALF in kinds else FULL}
        engines: dict[str, EngineFolder] = {}
        for name, bundle in bundles.items():
            place = self.output / f"{name}-engine"
            build = partial(build_engine, bundle, place, threads=THREADS, **how)
            engines[name] = self._make(f"build {name}", EngineFolder, build)
        # The benchmark takes the baselines of the first engine's inputs.
        first = next(iter(engines.values()))
        baselines = {
            kind: self._make(
                f"build {kind}", EngineFolder, partial(baseline_engine, self.model, self.backend, kind, first)
            )
            for kind in kinds
        }
        return baselines | engines

    def picture(self, engines: dict[str, EngineFolder]) -> None:
        """``grid.png``: images of the full-precision model and of each variant, from the same seeds."""
        from safetensors.torch import load_file

        from qdeploy.sampling.sample import sample

        sources: dict[str, tuple[str, Path | Artifact]] = {"full": ("full precision", self.model.path)}
        sources |= {name: (variant.title, engines[name]) for name, variant in self.variants.items()}
        sampling = Sampling(steps=STEPS, scheduler="ddim", seed=FIRST_IMAGE, batch=BATCH)
        groups = {}
        for name, (title, source) in sources.items():
            place = self.output / f"{name}-samples"
            run = partial(sample, source, place, sampling, samples=IMAGES)
            groups[title] = load_file(self._make(f"sample {name}", Samples, run).images)["images"]
        image_grid(groups, self.output / "grid.png")

    def check(self, engines: dict[str, EngineFolder]) -> dict[str, dict[str, Any]]:
        """Parity and quality of every engine but the full-precision one, by name."""
        from qdeploy.evaluate.check import check

        plan = QualityPlan(replace(CHECKING, steps=STEPS, batch=BATCH), self.samples)
        trajectories = cache(lambda: Trajectories(self.model, plan))
        results = {}
        for name, engine in engines.items():
            if name == FULL:
                continue
            pairs: dict[str, Any] = {}
            if name in self.variants:
                pairs = {"onnx": self.output / f"{name}-onnx", "checkpoint": self.output / name}

            def measure(engine: EngineFolder = engine, pairs: dict[str, Any] = pairs) -> dict[str, Any]:
                return check(engine, trajectories=trajectories(), **pairs).to_json()

            key = [engine.sha256, self.model.sha256, repr(plan)]
            file = self.output / "measured" / f"check-{name}.json"
            results[name] = self.stage(f"check {name}", partial(cached_result, file, key, measure))
        return results

    def benchmark(self, engines: dict[str, EngineFolder]) -> dict[str, Any]:
        """Latency of all engines in one run."""
        from qdeploy.evaluate.benchmark import benchmark

        def measure() -> dict[str, Any]:
            named = [engines[name] for name in self.variants]
            options: dict[str, Any] = {"batch": (1, BATCH), "rounds": self.rounds, "threads": THREADS}
            return benchmark(named, reference=self.model, **options).to_json()

        key = [[engine.sha256 for engine in engines.values()], self.rounds, machine()]
        file = self.output / "measured" / "benchmark.json"
        return self.stage("benchmark", partial(cached_result, file, key, measure))

    def report(self, checks: dict[str, dict[str, Any]], speed: dict[str, Any]) -> Path:
        """``report.html``: all of this on one page."""
        from qdeploy.evaluate.report_page.run import report

        paths = [
            self.output / f"{name}{part}"
            for name in self.variants
            for part in ("", "-onnx", "-engine", "-samples")
        ]
        run = partial(
            report,
            [*paths, self.output / "full-samples"],
            self.output / "report.html",
            reference=self.model,
            checks=[checks[name] for name in self.variants],
            benchmark=speed,
            folder=self.output / "measured",
        )
        return self.stage("report", run).path

    def _make(self, name: str, kind: type[A], run: Callable[[], object]) -> A:
        made = self.stage(name, run)
        assert isinstance(made, kind)
        return made

    def stage(self, name: str, run: Callable[[], T]) -> T:
        """Run one stage, and print a line with its time."""
        began = time.perf_counter()
        with _status(name):
            result = run()
        self.stages[name] = round(time.perf_counter() - began, 1)
        say(f"{name:<16} {self.stages[name]:6.1f} s")
        return result


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Networks this small gain little from a second thread, and are slowed down much by other load."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _status(name: str) -> Iterator[None]:
    """The stage's name on a terminal while it runs; messages from within are shown with ``-v`` only."""
    from rich.console import Console

    level = verbosity.level
    if level != 1:
        yield
        return
    verbosity.level = 0
    try:
        with Console(stderr=True).status(name):
            yield
    finally:
        verbosity.level = level
