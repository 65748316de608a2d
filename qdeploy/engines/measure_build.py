"""What is measured of an engine that was just built, and what is known of one that cannot run here."""

from __future__ import annotations

import json
import time
from pathlib import Path

from qdeploy.engines.base import UNKNOWN
from qdeploy.engines.floor import check_floor
from qdeploy.engines.int8_share import int8_layers, int8_mac_share
from qdeploy.engines.measure import latency, measure_sizes, read_macs, repeat_rows, row_by_row
from qdeploy.engines.registry import Backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.store.artifact import Bundle, EngineFolder
from qdeploy.store.builder import Draft
from qdeploy.store.facts import EngineFacts
from qdeploy.store.measured import DistanceMeasured, EngineMeasured, MachineMeasured, PlanMeasured
from qdeploy.store.probe import read_probe
from qdeploy.system.decibels import distance
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import machine
from qdeploy.system.progress import say


def measure_engine(
    backend: Backend, source: Bundle, draft: Draft[EngineFolder], facts: EngineFacts, allow_inaccurate: bool
) -> EngineMeasured:
    """Measure the new engine: its latency, its kernels, and its distance from the probe's outputs."""
    spec = EngineSpec.described_by(
        draft.content, facts, facts.engine_precision, int8_sums=facts.int8_sums, device=facts.device
    )
    inputs, reference, simulated = read_probe(draft.content)
    single = repeat_rows(inputs, 1)
    began = time.perf_counter()
    with backend.load(spec, facts.threads) as engine:
        engine(single)
        loaded = time.perf_counter() - began
        macs, meant = read_macs(draft.content)
        kernels = engine.kernels(single)
        shares = int8_mac_share(kernels, macs, meant)
        result = row_by_row(engine, inputs)
        ms = latency(engine, repeat_rows(inputs, facts.batch))
        sizes = measure_sizes(engine, draft.content)
    reported = all(kernel.precision != UNKNOWN for kernel in kernels)
    if reported and shares["int8_mac_share_of_meant"] < 0.9:
        left = meant - int8_layers(kernels)
        _warn_of_float(backend, shares["int8_mac_share_of_meant"], sorted(left, key=lambda name: -macs[name]))
    if not bool(result.isfinite().all()):
        raise InvalidInputError("the engine computes NaN or Inf for its own probe")
    parity = DistanceMeasured(**distance(result, reference if simulated is None else simulated))
    check_floor(result, reference, simulated, source, facts, draft.work / "blame", allow_inaccurate)
    return EngineMeasured(
        ms=ms,
        load_seconds=round(loaded, 3),
        int8_mac_share=shares["int8_mac_share"],
        int8_mac_share_of_meant=shares["int8_mac_share_of_meant"],
        parity=parity,
        sizes=sizes or None,
        size_mb=_size_mb(spec.component_folder),
        machine=MachineMeasured(**machine(backend.device)),
    )


def measure_plan(draft: Draft[EngineFolder], facts: EngineFacts, reason: str) -> EngineMeasured:
    """What is known of an engine that this machine cannot run: its size, and what the build says of its layers."""
    component = draft.content / facts.component
    built = json.loads((component / "layers.json").read_text())
    report = built["report"]
    if report["planned"] > report["as_planned"]:
        named = [*report["in_float"], *report["in_other"], *report["not_found"]]
        say(
            f"warning: {len(named)} of {report['planned']} quantized layers do not run as planned, first "
            f"{', '.join(named[:5])}: layers.json names them all"
        )
    return EngineMeasured(
        not_run=reason,
        planned=PlanMeasured(**{name: report[name] for name in PlanMeasured.__struct_fields__}),
        float32_results=len(report["float32_results"]),
        moved=built["moved"],
        size_mb=_size_mb(component),
        machine=MachineMeasured(**machine("cpu")),
    )


def _size_mb(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 3)


def _warn_of_float(backend: Backend, share: float, layers: list[str]) -> None:
    named = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    say(f"warning: {backend.name} runs {1 - share:.0%} of what was meant for int8 in float, first {named}")
