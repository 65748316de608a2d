"""What a report shows: passed by the caller, cached by an earlier run, or measured now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from qdeploy.evaluate.cached_json import cached_result
from qdeploy.evaluate.metrics.base import code_of_metrics
from qdeploy.evaluate.quality import QualityPlan, Trajectories
from qdeploy.evaluate.report_page.kernel_times import kernel_times
from qdeploy.evaluate.report_page.layer_errors import layer_errors
from qdeploy.evaluate.report_page.subjects import Given, Subject, can_run
from qdeploy.model.folder import Model, read_json
from qdeploy.store.artifact import DenoiserArtifact, EngineFolder, Samples, open_artifact
from qdeploy.system.devices import kind_of
from qdeploy.system.errors import InvalidInputError, QDeployError
from qdeploy.system.machine import machine
from qdeploy.system.progress import say

FIRST_IMAGE = 1000  # seeds of pictures; calibration sets usually hold seeds 0 to 63
Json = dict[str, Any]


@dataclass(frozen=True)
class Turns:
    """How speed is measured unless a result is passed: batch sizes and rounds."""

    batches: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class Pictures:
    """How many pictures are sampled unless samples are passed."""

    count: int
    plan: QualityPlan
    device: str = "cpu"


def read_result(source: str | Path | Mapping[str, Any]) -> Json:
    """A result as ``--json`` prints it or as the demo keeps it.

    Raises:
        InvalidInputError: the file holds no JSON object.
    """
    value = dict(source) if isinstance(source, Mapping) else read_json(Path(source))
    return _ordered(value["value"] if set(value) == {"key", "value"} else value)


def checks_of(
    given: Given,
    results: Sequence[str | Path | Mapping[str, Any]],
    reference: Model | None,
    plan: QualityPlan,
    folder: Path,
    device: str = "cpu",
) -> dict[str, Json]:
    """Parity and quality of every subject by name, from `qdeploy.evaluate.check.check`.

    Raises:
        InvalidInputError: a result is of none of the subjects, or a subject cannot be checked.
    """
    from qdeploy.evaluate.check import check

    found: dict[str, Json] = {}
    for source in results:
        result = read_result(source)
        mine = [subject for subject in given.subjects if subject.artifact.sha256 == result.get("sha256")]
        if not mine or "parity" not in result or "quality" not in result:
            raise InvalidInputError(
                f"{_named(source)} is not a result of `qdeploy check --json` for one of these"
            )
        found[mine[0].name] = result
    trajectories = cache(lambda model: Trajectories(model, plan, device))
    for number, subject in enumerate(given.subjects):
        if subject.name in found or not can_run(subject):
            continue

        def measure(subject: Subject = subject) -> Json:
            say(f"checking {subject.name}")
            before = {kind: a for kind, a in subject.before.items() if kind in ("onnx", "checkpoint")}
            shared = trajectories(reference) if reference is not None else None
            return check(subject.artifact, trajectories=shared, **before).to_json()  # type: ignore[arg-type]

        key = [
            subject.artifact.sha256,
            sorted(other.sha256 for other in subject.before.values()),
            reference.sha256 if reference else None,
            repr(plan) if device == "cpu" else f"{plan!r} {kind_of(device)}",
            *([code] if (code := code_of_metrics()) else []),
        ]
        found[subject.name] = _remembered(folder / f"check-{number}.json", key, measure)
    return {subject.name: found[subject.name] for subject in given.subjects if subject.name in found}


def benchmark_of(
    given: Given,
    result: str | Path | Mapping[str, Any] | None,
    reference: Model | None,
    turns: Turns,
    folder: Path,
) -> Json | None:
    """Latency of all engines in one run, from `qdeploy.evaluate.benchmark.benchmark`; None without engines."""
    from qdeploy.evaluate.benchmark import benchmark

    if result is not None:
        given_result = read_result(result)
        if "results" not in given_result or "ratios" not in given_result:
            raise InvalidInputError(f"{_named(result)} is not a result of `qdeploy benchmark --json`")
        return given_result
    engines = [s.artifact for s in given.subjects if isinstance(s.artifact, EngineFolder) and can_run(s)]
    if not engines or reference is None:
        return None

    def measure() -> Json:
        say("measuring speed")
        return benchmark(engines, reference=reference, batch=turns.batches, rounds=turns.rounds).to_json()

    key = [[engine.sha256 for engine in engines], turns.batches, turns.rounds, machine()]
    return _remembered(folder / "benchmark.json", key, measure)


def layer_errors_of(given: Given, reference: Model | None, folder: Path) -> dict[str, Json]:
    """The error by layer of every subject whose checkpoint is available, by name."""
    found: dict[str, Json] = {}
    for number, subject in enumerate(given.subjects):
        checkpoint = subject.checkpoint
        if reference is None or checkpoint is None:
            continue
        measure = partial(_said, f"error by layer of {subject.name}", layer_errors, checkpoint, reference)
        key = [checkpoint.sha256, reference.sha256]
        found[subject.name] = _remembered(folder / f"layers-{number}.json", key, measure)
    return found


def kernel_times_of(given: Given, speed: Mapping[str, Any] | None, folder: Path) -> dict[str, Json]:
    """Times by type of kernel of every engine that was timed on this machine, by its name in the benchmark."""
    found: dict[str, Json] = {}
    if speed is None or not given.subjects or speed.get("machine") != machine():
        return found
    batch = max(result["batch"] for result in speed["results"])
    probe = next(
        (s.artifact.path for s in given.subjects if not s.is_baseline), given.subjects[0].artifact.path
    )
    subjects = {subject.artifact.sha256: subject.artifact for subject in given.subjects}
    for number, result in enumerate(r for r in speed["results"] if r["batch"] == batch):
        engine = subjects.get(result["sha256"]) or _still_there(result)
        if engine is None:
            continue
        threads = speed.get("threads")
        what = f"where the time of {result['name']} goes"
        measure = partial(_said, what, kernel_times, engine, probe, batch, threads)
        key = [engine.sha256, batch, threads, machine()]
        times = _remembered(folder / f"kernels-{number}.json", key, measure)
        if times["kinds"]:
            found[result["name"]] = times
    return found


def samples_of(
    given: Given, reference: Model | None, pictures: Pictures, folder: Path
) -> tuple[Samples | None, dict[str, Samples]]:
    """Images of full precision, and of every quantized subject by name; None where there are none.

    Samples that were passed are used; others are made where the pipeline is available.

    Raises:
        UsageError: the pipeline needs prompts, and there are none.
    """
    by_source = {
        sha256: samples
        for samples in given.samples
        for kind, sha256 in samples.made_from.items()
        if kind in ("model", "engine", "checkpoint")
    }
    make = partial(_sample, pictures, folder)
    full = by_source.get(given.model_sha256)
    if full is None and (
        given.samples or not pictures.count or reference is None or not reference.has_pipeline
    ):
        return None, {}
    if full is None:
        assert reference is not None
        full = make(reference.path, "full")
    found: dict[str, Samples] = {}
    for number, subject in enumerate(given.subjects):
        chain = (subject.artifact, subject.checkpoint)
        known = (by_source.get(artifact.sha256) for artifact in chain if artifact is not None)
        mine = next((samples for samples in known if samples is not None), None)
        if mine is None and not given.samples and not subject.is_baseline and can_run(subject):
            if subject.artifact.kind == "onnx" and subject.checkpoint is None:
                continue  # no verb samples from a bundle
            source = subject.checkpoint if subject.artifact.kind == "onnx" else subject.artifact
            assert reference is not None
            assert source is not None
            mine = make(source, str(number), model=reference.path)
        if mine is not None:
            found[subject.name] = mine
    return full, found


def _sample(
    pictures: Pictures, folder: Path, source: Path | DenoiserArtifact, name: str, model: Path | None = None
) -> Samples:
    from qdeploy.sampling.sample import sample

    sampling = pictures.plan.sampling
    return sample(
        source,
        folder / f"pictures-{name}",
        replace(sampling, seed=FIRST_IMAGE, batch=min(sampling.batch, pictures.count)),
        samples=pictures.count,
        model=model,
        device=pictures.device,
        overwrite=True,
    )


def _still_there(result: Mapping[str, Any]) -> EngineFolder | None:
    """The engine of a benchmark's entry, if its folder still exists."""
    try:
        engine = open_artifact(result["path"], EngineFolder)
    except QDeployError:
        return None
    return engine if engine.sha256 == result["sha256"] else None


def _remembered(file: Path, key: object, measure: Callable[[], Json]) -> Json:
    return _ordered(cached_result(file, key, measure))


def _ordered(value: Mapping[str, Any]) -> Json:
    """Its keys in the order in which they are kept, so that a page is the same whether measured or cached."""
    return dict(json.loads(json.dumps(value, sort_keys=True)))


def _said(what: str, measure: Callable[..., Json], *arguments: Any) -> Json:
    say(what)
    return measure(*arguments)


def _named(source: str | Path | Mapping[str, Any]) -> str:
    return (
        str(source)
        if isinstance(source, str | Path)
        else f"a result of {source.get('path', 'unknown origin')}"
    )
