"""The search for a placement: measure errors and times, choose, build, and let measured latency decide."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from qdeploy.engines.base import Engine, Kernel
from qdeploy.engines.measure import repeat_rows, row_by_row, single_rows
from qdeploy.engines.placement.assign import Noise, least, quantizing_times, times_by_product
from qdeploy.engines.placement.decision import ALL, CHOSEN, NONE, Placement, reason
from qdeploy.engines.placement.noise import GATES, noise_of_each, with_gates
from qdeploy.engines.placement.switches import Switch, find_switches, take_out
from qdeploy.engines.registry import Backend, find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.engines.timing import take_turns
from qdeploy.export.graph import read, save
from qdeploy.export.graph.network import Network
from qdeploy.store.artifact import Bundle, EngineFolder
from qdeploy.store.builder import Draft
from qdeploy.store.facts import EngineFacts
from qdeploy.store.measured import CandidateMeasured, DecisionMeasured
from qdeploy.system.decibels import powers, sqnr_by_row
from qdeploy.system.errors import CheckFailed, UsageError
from qdeploy.system.progress import say, track

# Errors of single quantizers are measured on as many rows as this time allows, all of the probe's at most.
_SECONDS = 120.0
_LEAST_ROWS = 2
# Kernels are timed over so many calls, in so many interleaved rounds: the least of the medians is the time without
# interference from other processes.
_CALLS, _LOOKS = 5, 3
SAME = 0.02  # engines whose times differ by less are equally fast: the most exact of them is taken
_TRIES = 6  # engines that are built to meet a least SQNR
_ROUNDS, _RACE_SECONDS, _FAMILY_SECONDS = 15, 20.0, 4.0


class Placer:
    """Searches the placement of one bundle on one backend.

    Args:
        backend: where the engine will run; it has to report the times of its kernels.
        source: the ONNX bundle.
        graph: its denoiser's graph.
        draft: of the engine; keeps finished measurements, so that an interrupted search continues.
        facts: of the engine.
    """

    def __init__(
        self, backend: Backend, source: Bundle, graph: Path, draft: Draft[EngineFolder], facts: EngineFacts
    ) -> None:
        self._backend, self._source, self._draft, self._facts = backend, source, draft, facts
        self._component = facts.component
        self._graph = graph
        self._work = draft.work / "candidates"
        self._inputs, self._reference, _ = source.probe()
        self._batch = repeat_rows(self._inputs, facts.batch)
        self._shapes = {name: [] if name == "timestep" else list(x.shape) for name, x in self._batch.items()}
        self._network = Network(self._graph, self._shapes)
        self._macs = self._network.macs()

    def search(self, min_sqnr: float | None) -> Placement:
        """The fastest engine whose median SQNR to full precision is at least ``min_sqnr`` dB on the probe.

        Raises:
            UsageError: the graph has no quantizers.
            CheckFailed: even without any quantizer the SQNR is less.
        """
        switches = find_switches(read(self._graph))
        if not switches:
            raise UsageError(
                f"--optimize-for decides about quantizers of activations, and {self._source.path} has none"
            )
        shutil.rmtree(self._work, ignore_errors=True)
        noise = self._noise(switches)
        with ExitStack() as stack:
            engines = {
                ALL: stack.enter_context(self._build(())),
                NONE: stack.enter_context(self._build([switch.name for switch in switches])),
            }
            times, gains = self._times(engines, switches)
            sqnr = {name: self._sqnr(engine) for name, engine in engines.items()}
            if min_sqnr is not None and sqnr[NONE] < min_sqnr:
                raise CheckFailed(
                    f"no placement of {self._source.path} reaches {min_sqnr:g} dB: with all activations in "
                    f"{self._facts.engine_precision} it is {sqnr[NONE]:.1f} dB, from the quantized weights alone"
                )
            kept = self._choose(stack, engines, sqnr, switches, gains, noise, min_sqnr)
            ms = self.compare_latency(engines)
        able = [name for name in engines if min_sqnr is None or sqnr[name] >= min_sqnr]
        close = [name for name in able if ms[name] <= (1 + SAME) * min(ms[other] for other in able)]
        taken = max(close, key=lambda name: sqnr[name])
        here = {ALL: [True] * len(switches), NONE: [False] * len(switches), CHOSEN: kept}[taken]
        floats = tuple(switch.name for switch, stays in zip(switches, here, strict=True) if not stays)
        decisions = tuple(
            DecisionMeasured(
                quantizer=switch.name,
                products=list(switch.products),
                macs=self._macs_of(switch),
                int8_ms=round(times[index][0], 6),
                float_ms=round(times[index][1], 6),
                saved_ms=round(gains[index], 6),
                alone_db=round(noise.alone_db(index), 2),
                int8=stays,
                why=reason(stays, chosen, gains[index], taken),
            )
            for index, (switch, stays, chosen) in enumerate(zip(switches, here, kept, strict=True))
        )
        built = {
            name: CandidateMeasured(ms=round(ms[name], 4), sqnr_db=round(sqnr[name], 2)) for name in engines
        }
        graph = self._graph if not floats else self._placed(floats)
        placement = Placement(graph, floats, decisions, built, taken)
        placement.log()
        return placement

    # -- measurements --------------------------------------------------------------------------------------

    def _noise(self, switches: Sequence[Switch]) -> Noise:
        """Errors of all quantizers, each alone, simulated in float."""
        path = self._work / "gated" / self._component / "model.onnx"
        model = read(self._graph)
        save(with_gates(model, switches), path)
        oracle = find_backend("onnxruntime")
        rows = single_rows(self._inputs)
        with self._load(oracle, path, "gated") as engine:
            import torch

            none = {GATES: torch.zeros(len(switches), dtype=torch.bool)}
            engine({**rows[0], **none})
            began = time.perf_counter()
            engine({**rows[0], **none})
            call = time.perf_counter() - began
            able = max(_LEAST_ROWS, min(len(rows), _SECONDS / (call * (len(switches) + 1))))
            # A resumed search measures the rows that it began with, whatever the machine's speed is now.
            count = int(self._step("placement-rows", lambda: able))
            chosen = torch.linspace(0, len(rows) - 1, count).round().long().tolist()
            say(
                f"errors of {len(switches)} quantizers on {count} rows: about "
                f"{call * count * (len(switches) + 1):.0f} s"
            )
            step = self._draft.step
            plain, noises = noise_of_each(engine, [rows[i] for i in chosen], len(switches), step)
        signal, base = [], []
        for output, reference in zip(plain, self._reference[chosen], strict=True):
            s, n = powers(output, reference)
            signal.append(s)
            base.append(n)
        return Noise(signal, base, noises.tolist())

    def _times(
        self, engines: Mapping[str, Engine], switches: Sequence[Switch]
    ) -> tuple[list[tuple[float, float]], list[float]]:
        """For each quantizer the kernels' times of its layers in int8 and in float; and what it saves, all in ms.

        The times of kernels are not enough: a layer in float may cost a change of memory layout elsewhere. So the
        saving of int8 is measured on whole engines, each without the quantizers of one group of like layers,
        and divided among the group.
        """
        looks: dict[str, list[list[Kernel]]] = {name: [] for name in engines}
        for _ in track(range(_LOOKS), "times of kernels"):
            for name, engine in engines.items():
                looks[name].append(engine.kernels(self._batch, calls=_CALLS))
        kernels = {name: [least(same) for same in zip(*seen, strict=True)] for name, seen in looks.items()}
        wanted = {name: self._macs[name] for switch in switches for name in switch.products}
        fast, slow = (times_by_product(kernels[name], wanted) for name in (ALL, NONE))
        quantizing = quantizing_times(kernels[ALL], switches)
        pairs = [
            (sum(fast[name] for name in switch.products) + own, sum(slow[name] for name in switch.products))
            for switch, own in zip(switches, quantizing, strict=True)
        ]
        families = self._families(switches)
        say(f"{len(families)} groups of like layers, timed in turns: {', '.join(families)}")
        gains = [0.0] * len(switches)
        for name, members in track(families.items(), "groups of like layers"):
            saved = self._step(
                f"placement-family-{name}", partial(self.time_saved, engines[ALL], switches, members)
            )
            total = sum(self._macs_of(switches[index]) for index in members)
            for index in members:
                gains[index] = saved * self._macs_of(switches[index]) / total
        return pairs, gains

    def time_saved(self, every: Engine, switches: Sequence[Switch], members: Sequence[int]) -> float:
        """Milliseconds that int8 saves in some layers, against an engine without their quantizers."""
        with self._build([switches[index].name for index in members]) as without:
            turns = self._turns({ALL: every, CHOSEN: without}, _FAMILY_SECONDS)
        return median(b - a for a, b in zip(turns[ALL], turns[CHOSEN], strict=True))

    def _families(self, switches: Sequence[Switch]) -> dict[str, list[int]]:
        """Quantizers whose layers do the same work at the same size: by operation, kernel and output."""
        kinds: dict[str, str] = {}
        for layer in self._network.layers:
            w, y = (self._network.shape(value) for value in (layer.node.inputs[1], layer.node.outputs[0]))
            assert w is not None
            assert y is not None
            conv = layer.node.op_type.startswith("Conv")
            size = "x".join(map(str, y[2:] if conv else y[-2:-1]))
            kernel = "x".join(map(str, w[2:])) + " " if conv else ""
            kinds[layer.node.name or ""] = f"{layer.node.op_type} {kernel}at {size}"
        families: dict[str, list[int]] = {}
        for index, switch in enumerate(switches):
            families.setdefault(kinds[switch.products[0]], []).append(index)
        return families

    def _choose(
        self,
        stack: ExitStack,
        engines: dict[str, Engine],
        sqnr: dict[str, float],
        switches: Sequence[Switch],
        gains: Sequence[float],
        noise: Noise,
        min_sqnr: float | None,
    ) -> list[bool]:
        """Build the placement that saves most time, with a smaller allowance of error until its SQNR suffices."""
        aim = min_sqnr
        kept = [True] * len(switches)
        for _ in range(_TRIES):
            kept = noise.choose(gains, aim)
            if all(kept) or not any(kept):
                return kept
            out = [switch.name for switch, stays in zip(switches, kept, strict=True) if not stays]
            engine = stack.enter_context(self._build(out))
            reached = self._sqnr(engine)
            if min_sqnr is None or aim is None or reached >= min_sqnr:
                engines[CHOSEN], sqnr[CHOSEN] = engine, reached
                return kept
            aim += max(0.25, min_sqnr - reached)
        return [False] * len(switches)

    def compare_latency(self, engines: Mapping[str, Engine]) -> dict[str, float]:
        """Median milliseconds of a call of each engine, timed in turns."""
        turns = self._turns(engines, _RACE_SECONDS)
        return {name: median(times) for name, times in turns.items()}

    def _turns(self, engines: Mapping[str, Engine], seconds: float) -> dict[str, list[float]]:
        """Milliseconds of a call, by engine and round."""
        turns = take_turns(engines, dict.fromkeys(engines, self._batch), _ROUNDS, seconds, "in turns")
        return {name: [median(turn) for turn in rounds] for name, rounds in turns.items()}

    def _step(self, name: str, compute: Callable[[], float]) -> float:
        """A measured number, stored so that an interrupted search continues."""
        import torch

        kept = self._draft.step(name, lambda: {"value": torch.tensor(compute(), dtype=torch.float64)})
        return float(kept["value"])

    def _macs_of(self, switch: Switch) -> int:
        return sum(self._macs[name] for name in switch.products)

    def _sqnr(self, engine: Engine) -> float:
        return median(sqnr_by_row(row_by_row(engine, self._inputs), self._reference))

    # -- engines on the way --------------------------------------------------------------------------------

    def _placed(self, floats: Sequence[str]) -> Path:
        path = self._work / "placed" / self._component / "model.onnx"
        save(take_out(read(self._graph), set(floats)), path)
        return path

    def _build(self, floats: Sequence[str]) -> Engine:
        graph = self._placed(floats) if floats else self._graph
        folder = self._work / f"engine-{len(list(self._work.glob('engine-*')))}"
        build_options = {"precision": self._facts.engine_precision, "batch": self._facts.batch}
        self._backend.build(
            graph, folder / self._component, **(build_options if self._backend.build_options else {})
        )
        return self._load(self._backend, graph, folder.name)

    def _load(self, backend: Backend, graph: Path, name: str) -> Engine:
        folder = self._work / name / self._component
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._source.config, folder / "config.json")
        precision = self._facts.engine_precision if backend is self._backend else "f32"
        return backend.load(
            EngineSpec.described_by(folder.parent, self._facts, precision), self._facts.threads
        )
