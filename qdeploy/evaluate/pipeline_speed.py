"""The verb ``benchmark --pipeline``: whole pipelines from prompt to image, compared with the stock pipeline in torch.

Pipelines take turns, with the same prompts and seeds, so that other load on the machine affects all of them equally.
A ratio is the median over rounds of the quotient within one round; its interval is that of the sign test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdeploy.engines.build import load_engine
from qdeploy.engines.timing import LEAST_ROUNDS, quantile
from qdeploy.evaluate.baselines import FULL, HALF
from qdeploy.evaluate.intervals import of_median, rounded
from qdeploy.model.folder import COMPONENTS, Model
from qdeploy.model.origin import source_model
from qdeploy.model.pipeline import sample_images
from qdeploy.model.sampling import SAMPLING, Sampling, SamplingOptions, sampled
from qdeploy.model.schedulers import make_scheduler
from qdeploy.sampling.pipeline_folder import is_pipeline_folder, load_pipeline, quiet_loading
from qdeploy.store.artifact import Artifact, EngineFolder, open_artifact
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import has_bf16, machine
from qdeploy.system.progress import say, track
from qdeploy.system.tables import Table, amount, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

TEXT, DENOISER, DECODER = "text encoder", "denoiser", "decoder"
PARTS = (TEXT, DENOISER, DECODER)
TORCH = {FULL: torch.float32, HALF: torch.bfloat16}


@dataclass
class _Turn:
    """One call of a pipeline: wall time in ms, processor time in s, and wall time of its parts in ms."""

    ms: float = 0.0
    cpu: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


@dataclass(frozen=True)
class PipelineSpeed:
    """What was measured.

    Attributes:
        results: for every pipeline ``name``, ``path`` (None in torch), ``ms``, ``parts_ms``,
            ``images_per_cpu_second`` and ``psnr_db``, of its images to those of torch in float32.
        ratios: how many times as fast as torch a pipeline is, such as ``engine vs torch bf16``.
        intervals: of each ratio, at 95 %; None where there were too few rounds.
        conditions: the machine, threads, rounds and how was sampled.
    """

    results: list[dict[str, Any]]
    ratios: dict[str, float]
    intervals: dict[str, list[float] | None]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy benchmark --pipeline --json``."""
        return {
            "results": self.results,
            "ratios": self.ratios,
            "ratios_intervals": self.intervals,
            "ratio_is": "how many times as fast: torch's time by the pipeline's",
            **self.conditions,
        }

    def table(self) -> str:
        """The result for people."""
        columns = ["pipeline", "ms", "p95", *(f"{part}, ms" for part in PARTS), "images/CPU s", "PSNR, dB"]
        rows = [
            [
                each["name"],
                number(each["ms"]["median"]),
                number(each["ms"]["p95"]),
                *(number(each["parts_ms"][part]) for part in PARTS),
                number(each["images_per_cpu_second"], 3),
                amount(each["psnr_db"], 1),
            ]
            for each in self.results
        ]
        ratios = [
            f"{pair}: {ratio:.2f}x, "
            + ("too few rounds for an interval" if ends is None else _between(*ends))
            for (pair, ratio), ends in zip(self.ratios.items(), self.intervals.values(), strict=True)
        ]
        where = self.conditions
        note = (
            f"{where['samples']} images of {where['steps']} steps, {where['rounds']} rounds, "
            f"threads: {where['threads'] or 'all'}, {where['machine']['cpu']}"
        )
        return "\n".join([Table(columns, rows).text(), *ratios, note])


def _between(low: float, high: float) -> str:
    seen = "" if low > 1 or high < 1 else ": no difference seen"
    return f"95 % between {low:.2f}x and {high:.2f}x{seen}"


@sampled(SAMPLING)
def benchmark_pipelines(
    paths: Sequence[str | Path | Artifact],
    sampling: Sampling | None = None,
    *,
    reference: str | Path | Model | None = None,
    rounds: int = 30,
    seconds: float = 120.0,
    threads: int | None = None,
    **options: Unpack[SamplingOptions],
) -> PipelineSpeed:
    """Time whole pipelines, from prompts to images, and the stock pipeline in torch in float32 and in bf16.

    Args:
        paths: engines. One that is a denoiser alone runs in the pipeline of its model, whose rest is torch.
        sampling: how; ``batch`` images are made in each call.
        reference: the full-precision model; by default the one that an engine was made from.
        rounds: turns of every pipeline.
        seconds: about how long all rounds may take; beyond that, fewer are made, three at least.
        threads: of engines and of torch; by default the number that the engines were built for, if it is the same for
            all.
        options: fields of `Sampling`, in place of those of ``sampling``.

    Raises:
        UsageError: no engine is named, an impossible number, or prompts are missing.
        InvalidInputError: a path is no engine, or the model it was made from cannot be found.
        CapabilityError: a runtime is not installed.
    """
    if not paths:
        raise UsageError("name at least one engine")
    if min(rounds, 1 if threads is None else threads) < 1:
        raise UsageError("rounds and threads must be at least 1")
    artifacts = [open_artifact(path, EngineFolder) for path in paths]
    if threads is None:
        built_for = {artifact.facts.threads for artifact in artifacts}
        threads = built_for.pop() if len(built_for) == 1 else None
    chosen = (sampling or SAMPLING).changed(dict(options)).sized_like(artifacts[0].facts.sampled)
    model = source_model(artifacts[0], reference)
    with _torch_threads(threads):
        pipelines = dict(_pipelines(artifacts, model, threads))
        for each in pipelines.values():
            each.scheduler = make_scheduler(chosen.scheduler, each.scheduler)
        turns, images = _take_turns(pipelines, chosen, rounds, seconds)
    places = dict(zip(_names(artifacts), artifacts, strict=True))
    full = images[_torch_name(FULL)]
    results = [
        _result(name, turns[name], images[name], full, chosen.batch, places.get(name)) for name in turns
    ]
    ratios: dict[str, float] = {}
    intervals: dict[str, list[float] | None] = {}
    for name in places:
        for baseline in turns.keys() - places.keys():
            pairs = zip(turns[name], turns[baseline], strict=True)
            quotients = [theirs.ms / own.ms for own, theirs in pairs]
            ratios[f"{name} vs {baseline}"] = round(median(quotients), 3)
            intervals[f"{name} vs {baseline}"] = rounded(of_median(quotients), 3)
    conditions = {
        "machine": machine(),
        "threads": threads,
        "rounds": len(next(iter(turns.values()))),
        "steps": chosen.steps,
        "samples": chosen.batch,
    }
    return PipelineSpeed(results, ratios, intervals, conditions)


def _names(artifacts: Sequence[EngineFolder]) -> list[str]:
    names = [artifact.path.resolve().name for artifact in artifacts]
    return [
        name if names.count(name) == 1 else str(artifact.path)
        for name, artifact in zip(names, artifacts, strict=True)
    ]


def _torch_name(precision: str) -> str:
    return f"torch {precision}"


def _pipelines(
    artifacts: Sequence[EngineFolder], model: Model, threads: int | None
) -> Iterator[tuple[str, Any]]:
    for precision in (FULL, HALF) if has_bf16() else (FULL,):
        yield _torch_name(precision), _without_checker(model.pipeline()).to(TORCH[precision])
    for name, artifact in zip(_names(artifacts), artifacts, strict=True):
        if is_pipeline_folder(artifact):
            yield name, _without_checker(load_pipeline(artifact, threads=threads))
        else:
            say(f"{artifact.path} is a denoiser alone: the rest of its pipeline runs in torch")
            denoiser: Any = load_engine(artifact, threads=threads).as_denoiser()
            with quiet_loading():
                yield name, _without_checker(model.pipeline(denoiser))


def _without_checker(pipeline: Any) -> Any:
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _take_turns(
    pipelines: Mapping[str, Any], sampling: Sampling, rounds: int, seconds: float
) -> tuple[dict[str, list[_Turn]], dict[str, Tensor]]:
    """The turns of each pipeline, and its images."""
    numbers = range(sampling.batch)
    runs = {name: _timed(pipeline, sampling, numbers) for name, pipeline in pipelines.items()}
    images = {name: run()[1] for name, run in runs.items()}  # the first call compiles, and is not counted
    turns: dict[str, list[_Turn]] = {name: [] for name in runs}
    order, end = list(runs), time.perf_counter() + seconds
    for number_of_round in track(range(rounds), "pipelines"):
        if number_of_round >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            turns[name].append(runs[name]()[0])
        order.append(order.pop(0))  # no pipeline always follows the same other one
    return turns, images


def _timed(pipeline: Any, sampling: Sampling, numbers: Sequence[int]) -> Callable[[], tuple[_Turn, Tensor]]:
    """A call that measures itself."""
    turn = _Turn()

    def watch(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                turn.parts[part] += (time.perf_counter() - began) * 1e3

        return watched

    networks: dict[str, Any] = {
        name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    for name, module in networks.items():
        if name in COMPONENTS:
            module.forward = watch(DENOISER, module.forward)
        elif name.startswith("text_encoder"):
            module.forward = watch(TEXT, module.forward)
        elif hasattr(module, "decode"):
            module.decode = watch(DECODER, module.decode)

    def run() -> tuple[_Turn, Tensor]:
        nonlocal turn
        turn = _Turn()
        wall, cpu = time.perf_counter(), time.process_time()
        values = sample_images(pipeline, sampling, numbers).values
        turn.ms, turn.cpu = (time.perf_counter() - wall) * 1e3, time.process_time() - cpu
        return turn, values

    return run


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _result(
    name: str,
    turns: Sequence[_Turn],
    images: Tensor,
    full: Tensor,
    count: int,
    artifact: EngineFolder | None,
) -> dict[str, Any]:
    times = [turn.ms for turn in turns]
    error = float((images.double() - full.double()).square().mean())
    return {
        "name": name,
        "path": None if artifact is None else str(artifact.path),
        "sha256": None if artifact is None else artifact.sha256,
        "ms": {"median": round(median(times), 2), "p95": round(quantile(times, 0.95), 2)},
        "parts_ms": {part: round(median(turn.parts[part] for turn in turns), 2) for part in PARTS},
        "images_per_cpu_second": round(count / max(median(turn.cpu for turn in turns), 1e-9), 4),
        "psnr_db": None if error == 0 else round(-10 * float(torch.tensor(error).log10()), 2),
    }
