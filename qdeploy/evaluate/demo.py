"""The verb ``demo``: the whole way on a model that the package ships, from the model to a table.

Every stage is an artifact or a remembered result in the output folder, so that a stopped demo continues, and
a finished one answers at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from qdeploy.artifact import Artifact, explained_os_errors, sha256_of, write_atomically, write_json
from qdeploy.denoiser import Model, open_model
from qdeploy.engines.machine import has_bf16, machine
from qdeploy.engines.registry import find_backend
from qdeploy.evaluate.baselines import FULL, HALF, baseline_engine, baseline_precisions
from qdeploy.evaluate.quality import Plan, Trajectories
from qdeploy.evaluate.report import MISSING, image_grid, markdown_table, number, text_table
from qdeploy.progress import say, verbosity

T = TypeVar("T")

STEPS = 50  # of DDIM, for calibration, images and checks alike
IMAGES, FIRST_IMAGE = 32, 1000  # of the picture; the calibration set holds seeds 0 to 63
BATCH = 16  # that speed is told for, as in sampling
# Title, recipe, effort.
VARIANTS = {
    "w8a8": ("8-bit (W8A8)", "w8a8-minmax", "fast"),
    "w4a8": ("4-bit (W4A8)", "w4a8-qdiffusion", "fast"),
}


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, and what came out.

    Attributes:
        path: the output folder.
        columns: of the table.
        rows: of the table, a line for each engine.
        stages: seconds of each stage.
        checks: what `qdeploy.check` measured, by engine.
        benchmark: what `qdeploy.benchmark` measured.
        notes: lines below the table.
    """

    path: Path
    columns: list[str]
    rows: list[list[str]]
    stages: dict[str, float]
    checks: dict[str, dict[str, Any]]
    benchmark: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every engine keeps parity and quality."""
        return all(check["passed"] for check in self.checks.values())

    @property
    def table(self) -> str:
        """The result for the terminal."""
        return "\n".join([text_table(self.columns, self.rows), *self.notes])

    def markdown(self) -> str:
        """The result in Markdown."""
        return (
            "\n".join([markdown_table(self.columns, self.rows), *(f"{note}  " for note in self.notes)]) + "\n"
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy demo --json``."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "seconds": round(sum(self.stages.values()), 1),
            "stages": self.stages,
            "checks": self.checks,
            "benchmark": self.benchmark,
        }


def demo(
    output: str | Path = "qdeploy-demo",
    *,
    model: str | Path = "digits",
    backend: str = "auto",
    samples: int = 128,
    rounds: int = 30,
) -> DemoResult:
    """Collect, calibrate to 8 and 4 bits, export, build engines, sample, check and benchmark.

    Args:
        output: folder of everything that is made: artifacts, ``grid.png``, ``table.md``, ``results.json``.
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
    work = _Work(Path(output), open_model(model), find_backend(backend).name, samples, rounds)
    say(f"{work.model.path.name}: about five minutes on two cores; everything goes to {work.output}/")
    with explained_os_errors(work.output):
        work.output.mkdir(parents=True, exist_ok=True)
    engines = work.build()
    work.picture(engines)
    checks = work.check(engines)
    speed = work.benchmark(engines)
    columns, rows = table_rows(engines, checks, speed)
    notes = table_notes(checks, speed, work.output)
    result = DemoResult(work.output, columns, rows, work.stages, checks, speed, notes)
    write_json(work.output / "results.json", result.to_json())
    write_atomically(work.output / "table.md", lambda partial: _write_text(partial, result.markdown()))
    return result


@dataclass
class _Work:
    """The stages. Each takes up what an earlier run has finished."""

    output: Path
    model: Model
    backend: str
    samples: int
    rounds: int
    stages: dict[str, float] = field(default_factory=dict)

    def build(self) -> dict[str, Artifact]:
        """The engines: ``f32`` and ``bf16`` as baselines, and one for each variant."""
        from qdeploy.calibrate.run import calibrate
        from qdeploy.calibrate.trajectory import collect
        from qdeploy.engines.build import build_engine
        from qdeploy.export.run import export

        source = self.model.path
        data = self._stage(
            "collect",
            partial(
                collect, source, self.output / "set", inference_steps=STEPS, scheduler="ddim", batch=BATCH
            ),
        )
        checkpoints = {}
        for name, (_, recipe, effort) in VARIANTS.items():
            options = {"recipe": recipe, "effort": effort, "calibration": data}
            checkpoints[name] = self._stage(
                f"calibrate {name}", partial(calibrate, source, self.output / name, **options)
            )
        bundles = {
            name: self._stage(f"export {name}", partial(export, made, self.output / f"{name}-onnx"))
            for name, made in checkpoints.items()
        }
        engines: dict[str, Artifact] = {}
        for kind in baseline_precisions(self.backend):
            engines[kind] = self._stage(
                f"build {kind}", partial(baseline_engine, self.model, self.backend, kind)
            )
        # What is not int8 is computed in 16 bits where the processor can, as in the engine it is held against.
        rest = HALF if HALF in engines and has_bf16() else FULL
        for name, bundle in bundles.items():
            place = self.output / f"{name}-engine"
            options = {"backend": self.backend, "precision": rest}
            engines[name] = self._stage(f"build {name}", partial(build_engine, bundle, place, **options))
        return engines

    def picture(self, engines: dict[str, Artifact]) -> None:
        """``grid.png``: images of the full-precision model and of each variant, from the same seeds."""
        from safetensors.torch import load_file

        from qdeploy.runtime.sample import IMAGES as FILE
        from qdeploy.runtime.sample import sample

        sources: dict[str, tuple[str, Path | Artifact]] = {"full": ("full precision", self.model.path)}
        sources |= {name: (title, engines[name]) for name, (title, _, _) in VARIANTS.items()}
        options: dict[str, Any] = {"count": IMAGES, "steps": STEPS, "scheduler": "ddim", "seed": FIRST_IMAGE}
        groups = {}
        for name, (title, source) in sources.items():
            place = self.output / f"{name}-samples"
            made = self._stage(f"sample {name}", partial(sample, source, place, batch=BATCH, **options))
            groups[title] = load_file(made.file(FILE))["images"]
        image_grid(groups, self.output / "grid.png")

    def check(self, engines: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
        """Parity and quality of every engine but the full-precision one, by name."""
        from qdeploy.evaluate.check import check

        plan = Plan(samples=self.samples, inference_steps=STEPS, scheduler="ddim", batch=BATCH)
        trajectories = cache(lambda: Trajectories(self.model, plan))
        results = {}
        for name, engine in engines.items():
            if name == FULL:
                continue
            pairs: dict[str, Any] = {}
            if name in VARIANTS:
                pairs = {"onnx": self.output / f"{name}-onnx", "checkpoint": self.output / name}

            def measure(engine: Artifact = engine, pairs: dict[str, Any] = pairs) -> dict[str, Any]:
                return check(engine, trajectories=trajectories(), **pairs).to_json()

            key = [engine.sha256, self.model.sha256, repr(plan)]
            results[name] = self._stage(
                f"check {name}", partial(self._remembered, f"check-{name}", key, measure)
            )
        return results

    def benchmark(self, engines: dict[str, Artifact]) -> dict[str, Any]:
        """Latency of all engines in one run."""
        from qdeploy.evaluate.benchmark import benchmark

        def measure() -> dict[str, Any]:
            named = [engines[name] for name in VARIANTS]
            return benchmark(named, reference=self.model, batch=(1, BATCH), rounds=self.rounds).to_json()

        key = [[engine.sha256 for engine in engines.values()], self.rounds, machine()]
        return self._stage("benchmark", partial(self._remembered, "benchmark", key, measure))

    def _stage(self, name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        with _status(name):
            result = run()
        self.stages[name] = round(time.perf_counter() - began, 1)
        say(f"{name:<16} {self.stages[name]:6.1f} s")
        return result

    def _remembered(self, name: str, key: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result from ``measured/NAME.json``, if it is that of ``key``; else measured and put there."""
        file, wanted = self.output / "measured" / f"{name}.json", sha256_of(key)
        try:
            stored = json.loads(file.read_text())
            if stored["key"] == wanted:
                return dict(stored["value"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = measure()
        write_json(file, {"key": wanted, "value": value})
        return value


@contextmanager
def _status(name: str) -> Iterator[None]:
    """The stage's name on a terminal while it runs; what is said within only shows with ``-v``."""
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


# -- the table ---------------------------------------------------------------------------------------------


def table_rows(
    engines: dict[str, Artifact], checks: dict[str, dict[str, Any]], speed: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one row for each engine."""
    results = {
        name: result
        for result in speed["results"]
        if result["batch"] == BATCH
        for name, engine in engines.items()
        if Path(result["path"]) == engine.path
    }
    titles = {FULL: "full precision", HALF: "16-bit"} | {
        name: title for name, (title, _, _) in VARIANTS.items()
    }
    columns = [
        "engine",
        "MB",
        f"ms per step, {BATCH} images",
        "vs f32",
        "vs bf16",
        "SQNR dB, median",
        "worst",
        "PSNR dB",
        "FD-local",
        "int8 MACs",
        "parity dB",
    ]
    reference = next((check["quality"].get("fd_local") for check in checks.values()), None)
    rows = []
    for name in engines:
        result, check = results[name], checks.get(name)
        quality = check["quality"] if check else {}
        sqnr = quality.get("sqnr_db", {})
        fd = quality.get("fd_local", {}).get("subject")
        if check is None and reference:
            fd = reference["reference"]
        ratios = [speed["ratios"].get(f"{result['name']} vs {kind}, batch {BATCH}") for kind in (FULL, HALF)]
        rows.append(
            [
                titles[name],
                number(result["size_mb"], 1),
                number(result["ms"]["median"]),
                *(MISSING if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
                number(sqnr.get("median"), 1),
                number(sqnr.get("worst"), 1),
                number(quality.get("psnr_db"), 1),
                number(fd),
                f"{result['int8_mac_share']:.0%}",
                number(check["parity"]["sqnr_db"] if check else None, 1),
            ]
        )
    return columns, rows


def table_notes(checks: dict[str, dict[str, Any]], speed: dict[str, Any], output: Path) -> list[str]:
    """What the table's numbers are of."""
    where, some = speed["machine"], next(iter(checks.values()))["quality"]
    threads = speed["threads"] or "all"
    notes = [
        f"speed: {where['cpu']}, {where['cores']} cores, threads: {threads}, medians of interleaved rounds",
        f"quality: {some['samples']} images of fresh seeds, DDIM {some['inference_steps']} steps, beside full "
        "precision; FD-local is no FID",
    ]
    for name, check in checks.items():
        verdict = "passed" if check["passed"] else "; ".join(check["failures"])
        notes.append(f"check {name}: {verdict}")
    return [*notes, f"images of the same seeds: {output / 'grid.png'}"]
