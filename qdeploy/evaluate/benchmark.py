"""The verb ``benchmark``: speed, always against the full-precision and 16-bit engines of the same model.

Engines take turns, so that other load on the machine affects all of them equally. A ratio is the median over
rounds of the quotient within one round, which is steadier than the quotient of two medians.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import Engine
from qdeploy.engines.engine_slot import EngineInTurn, EngineSlot
from qdeploy.engines.measure import int8_shares, repeat_rows
from qdeploy.engines.registry import find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.engines.timing import quantile, take_turns
from qdeploy.evaluate.baselines import FULL, HALF, HALVES, Entrant, enter, is_baseline
from qdeploy.evaluate.ratios import in_words
from qdeploy.model.folder import Model
from qdeploy.store.artifact import Artifact, EngineFolder, open_artifact
from qdeploy.system.errors import UsageError
from qdeploy.system.machine import machine
from qdeploy.system.memory import physical_memory
from qdeploy.system.progress import say
from qdeploy.system.tables import Cell, Table, amount, number, percentage

if TYPE_CHECKING:
    from torch import Tensor

# A loaded engine takes about twice what its files do, and a machine has other things to do.
TOGETHER = 0.25


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured.

    Attributes:
        results: for every engine and batch size ``name``, ``path``, ``sha256``, ``backend``, ``precision``,
            ``float``, ``batch``, ``ms``, ``size_mb`` and ``int8_mac_share``.
        ratios: how many times as fast as its baselines an engine is, such as ``w8a8-engine vs bf16``.
        spread: the quartiles of each ratio over rounds.
        conditions: the machine, threads, rounds.
    """

    results: list[dict[str, Any]]
    ratios: dict[str, float]
    spread: dict[str, list[float]]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy benchmark --json``."""
        return {
            "results": self.results,
            "ratios": self.ratios,
            "ratios_quartiles": self.spread,
            "ratio_is": "how many times as fast: the baseline's time by the engine's",
            **self.conditions,
        }

    def ratio(self, name: str, precision: str, batch: int) -> float | None:
        """How many times as fast as a baseline an engine is."""
        return self.ratios.get(_ratio_name(name, precision, batch, self.batches))

    @property
    def batches(self) -> list[int]:
        """The batch sizes, ascending."""
        return sorted({result["batch"] for result in self.results})

    def rows(self) -> Table:
        """A row for each engine and batch size."""
        # On CPUs 16 bits are bf16, on GPUs f16.
        half = next((kind for kind in HALVES.values() if any(f"vs {kind}" in r for r in self.ratios)), HALF)
        columns = [
            "engine",
            "backend",
            "precision",
            "batch",
            "ms",
            "p95",
            "vs f32",
            f"vs {half}",
            "MB",
            "int8 MACs",
        ]
        rows = []
        for result in self.results:
            names = [
                _ratio_name(result["name"], kind, result["batch"], self.batches) for kind in (FULL, half)
            ]
            rows.append(
                [
                    result["name"],
                    result["backend"],
                    result["precision"],
                    str(result["batch"]),
                    number(result["ms"]["median"], 3),
                    number(result["ms"]["p95"], 3),
                    *(self._ratio_cell(name) for name in names),
                    number(result["size_mb"]),
                    percentage(result["int8_mac_share"]),
                ]
            )
        return Table(columns, rows)

    def _ratio_cell(self, name: str) -> Cell:
        ratio = self.ratios.get(name)
        return amount(None) if ratio is None else Cell(in_words(ratio, self.spread.get(name)), ratio)

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        return self.rows()._repr_html_()

    def table(self) -> str:
        """The result for people."""
        where = self.conditions["machine"]
        threads = self.conditions["threads"] or "all"
        note = f"{where['cpu']} ({', '.join(where['features'])}), {where['cores']} cores, threads: {threads}"
        return f"{self.rows().text()}\n{note}"

    def markdown(self) -> str:
        """The table in Markdown."""
        return self.rows().markdown()


def benchmark(
    paths: Sequence[str | Path | Artifact],
    *,
    reference: str | Path | Model | None = None,
    batch: int | Sequence[int] = 1,
    rounds: int = 30,
    seconds: float = 60.0,
    threads: int | None = None,
) -> BenchmarkResult:
    """Time engines and the full-precision and 16-bit engines of the same model, interleaved in one run.

    The baselines are built at their first use and kept in the cache. All engines stay loaded, unless their files
    take more than a quarter of the machine's memory: then each is loaded for its turn.

    Args:
        paths: engines.
        reference: the full-precision model; by default the one that an engine was made from, where it was.
        batch: samples per call; several are measured one after the other.
        rounds: turns of every engine, at each batch size.
        seconds: about how long all rounds of a batch size may take; beyond that, fewer are made.
        threads: threads of all engines; by default the number that they were built for, if it is the same
            for all, else each runtime's own choice.

    Returns:
        Median and 95th percentile of a call, and how many times as fast as the baselines that is.

    Raises:
        UsageError: no engine is named, or an impossible number.
        InvalidInputError: a path is no engine, or the model it was made from cannot be found.
        CapabilityError: a runtime is not installed.
    """
    batches = [batch] if isinstance(batch, int) else list(batch)
    if not paths or not batches:
        raise UsageError("name at least one engine, and one batch size")
    if min(*batches, rounds, 1 if threads is None else threads) < 1:
        raise UsageError("batch, rounds and threads must be at least 1")
    artifacts = [open_artifact(path, EngineFolder) for path in paths]
    if threads is None:
        built_for = {artifact.facts.threads for artifact in artifacts}
        threads = built_for.pop() if len(built_for) == 1 else None
    entrants = enter(artifacts, reference)
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(engine) for name, engine in _engines(entrants, threads)}
        probes = {entrant.name: _inputs(entrant, entrants) for entrant in entrants}
        for size in sorted(set(batches)):
            inputs = {name: repeat_rows(probe, size) for name, probe in probes.items()}
            turns = take_turns(engines, inputs, rounds, seconds, f"batch {size}")
            for entrant in entrants:
                shares = int8_shares(engines[entrant.name], inputs[entrant.name])
                results.append(_result(entrant, size, turns[entrant.name], shares["int8_mac_share"]))
                for precision, rival in entrant.rivals.items():
                    name = _ratio_name(entrant.name, precision, size, batches)
                    quotients = [
                        median(theirs) / median(own)
                        for own, theirs in zip(turns[entrant.name], turns[rival], strict=True)
                    ]
                    ratios[name] = round(median(quotients), 3)
                    spread[name] = [round(quantile(quotients, share), 3) for share in (0.25, 0.75)]
    devices = {find_backend(entrant.artifact.facts.backend).device for entrant in entrants}
    conditions = {"machine": machine(max(devices)), "threads": threads, "rounds": rounds}
    return BenchmarkResult(results, ratios, spread, conditions)


def _inputs(entrant: Entrant, entrants: Sequence[Entrant]) -> dict[str, Tensor]:
    """The probe to call an engine with: the same for all engines of a model, one of real inputs if possible."""
    model = entrant.artifact.facts.model_sha256
    same = [other for other in entrants if other.artifact.facts.model_sha256 == model]
    return next((e for e in same if not is_baseline(e.artifact)), entrant).artifact.probe().inputs


def _engines(entrants: Sequence[Entrant], threads: int | None) -> Iterator[tuple[str, Engine]]:
    """The engines by name, ready to be called: all loaded, or each when its turn comes."""
    memory, size = physical_memory(), sum(_size_mb(entrant.artifact) for entrant in entrants) * 1e6
    load = partial(load_timed, threads=threads)
    if memory is None or size <= TOGETHER * memory:
        yield from ((entrant.name, load(entrant.artifact)) for entrant in entrants)
        return
    say(f"{size / 1e9:.1f} GB of engines: each is loaded for its turn")
    slot = EngineSlot(load)
    yield from ((entrant.name, EngineInTurn(entrant.artifact, slot)) for entrant in entrants)


def load_timed(artifact: EngineFolder, threads: int | None) -> Engine:
    """Load an engine on the threads that it is timed with."""
    return find_backend(artifact.facts.backend).load(EngineSpec.of(artifact), threads)


def _result(
    entrant: Entrant, batch: int, turns: Sequence[Sequence[float]], int8_share: float
) -> dict[str, Any]:
    times = [ms for turn in turns for ms in turn]
    facts = entrant.artifact.facts
    return {
        "name": entrant.name,
        "path": str(entrant.artifact.path),
        "sha256": entrant.artifact.sha256,
        "backend": facts.backend,
        "precision": entrant.precision,
        "float": facts.engine_precision,
        "batch": batch,
        "ms": {"median": round(median(times), 4), "p95": round(quantile(times, 0.95), 4)},
        "calls": len(times),
        "size_mb": _size_mb(entrant.artifact),
        "int8_mac_share": int8_share,
    }


def _size_mb(artifact: EngineFolder) -> float:
    """Size of what the runtime loads, in MB of 10^6 bytes."""
    return round(artifact.size(artifact.component) / 1e6, 3)


def _ratio_name(name: str, precision: str, batch: int, batches: Sequence[int]) -> str:
    suffix = f", batch {batch}" if len(set(batches)) > 1 else ""
    return f"{name} vs {precision}{suffix}"
