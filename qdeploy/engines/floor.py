"""Accuracy floors of a new engine: its outputs on the probe are compared with those of the calibrated model.

A bundle that was calibrated with garbage, or that a runtime computes wrongly, makes an engine that runs, fast, and
draws nothing. Such an engine is refused, with the layer whose quantizer does most harm.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.engines.measure import single_rows
from qdeploy.engines.placement.noise import noise_of_each, with_gates
from qdeploy.engines.placement.switches import Switch, find_switches
from qdeploy.engines.registry import find_backend
from qdeploy.engines.spec import EngineSpec
from qdeploy.export.graph import read, save
from qdeploy.store.artifact import Bundle
from qdeploy.store.facts import DenoiserFacts
from qdeploy.system.decibels import decibels, distance, powers
from qdeploy.system.errors import CheckFailed
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SQNR = 6.0  # dB, median over rows: below, a quarter of the power of the prediction is error
LEAST_PARITY = 20.0  # dB over all elements: engines in 16 bits reach 35 and more
# An engine may round differently here and there, and every difference spreads. Two independent roundings are
# twice the quantization noise apart; beyond twice that, the engine computes something else.
_NOISE_RATIO = 4.0
_ROWS = 2  # that the harm of each quantizer is measured on


def shortfall(output: Tensor, reference: Tensor, simulated: Tensor | None) -> str | None:
    """What is wrong with an engine's outputs on its probe; None if nothing is.

    Args:
        output: ``[rows, ...]`` of the engine.
        reference: of the model in full precision.
        simulated: of the fake-quantized model; None where nothing is quantized.
    """
    expected = reference if simulated is None else simulated
    parity = distance(output, expected)
    sqnr = parity if simulated is None else distance(output, reference)
    apart = parity["pooled_db"] < LEAST_PARITY
    if simulated is not None:
        apart = apart and (parity["pooled_db"] < LEAST_SQNR or _unlike(output, reference, simulated))
    if apart:
        what = "the model in full precision" if simulated is None else "the model that was calibrated"
        return f"it is only {parity['pooled_db']} dB from {what}, so it computes something else"
    if sqnr["sqnr_db"] < LEAST_SQNR:
        return f"its SQNR to full precision on the probe is {sqnr['sqnr_db']} dB, and {LEAST_SQNR:g} is the least"
    return None


def _unlike(output: Tensor, reference: Tensor, simulated: Tensor) -> bool:
    """Whether an engine is further from the calibrated model than that is from full precision."""
    (_, noise), (_, quantization) = powers(output, simulated), powers(simulated, reference)
    return noise > _NOISE_RATIO * quantization


def check_floor(
    output: Tensor,
    reference: Tensor,
    simulated: Tensor | None,
    source: Bundle,
    facts: DenoiserFacts,
    scratch: Path,
    allow: bool,
) -> None:
    """Refuse an engine below the floor, or warn of it.

    Args:
        output: ``[rows, ...]`` of the engine on the probe.
        reference: of the model in full precision.
        simulated: of the fake-quantized model; None where nothing is quantized.
        source: what the engine is built from.
        facts: of its denoiser.
        scratch: folder for a graph.
        allow: warn only.

    Raises:
        CheckFailed: it is below; with the layer whose quantizer alone does most harm.
    """
    reason = shortfall(output, reference, simulated)
    if reason is None:
        if simulated is not None and _unlike(output, reference, simulated):
            say(
                f"warning: this engine is only {distance(output, simulated)['pooled_db']} dB from the model that was "
                "calibrated, further than that is from full precision: choose another backend, and report this"
            )
        return
    reason += _blame(source, facts, scratch)
    if allow:
        say(f"warning: {reason}")
        return
    raise CheckFailed(
        f"the engine of {source.path} is not accurate enough to keep: {reason}; calibrate again, choose another "
        "backend, or pass --allow-inaccurate"
    )


def _blame(source: Bundle, facts: DenoiserFacts, scratch: Path) -> str:
    """The layer whose quantizer of activations alone costs most, as the end of a sentence."""
    model = read(source.graph)
    switches = find_switches(model)
    if not switches:
        return "; no activation is quantized, so it is the weights or the runtime"
    switch, alone = worst_quantizer(source, facts, switches, scratch)
    return f"; most is lost in {', '.join(switch.products[:3])}, whose input alone leaves {alone:.1f} dB"


def worst_quantizer(
    source: Bundle, facts: DenoiserFacts, switches: list[Switch], scratch: Path
) -> tuple[Switch, float]:
    """The quantizer that alone leaves the least SQNR to the graph without any, in dB, on a few rows.

    Args:
        source: the bundle.
        facts: of its denoiser.
        switches: quantizers of its graph.
        scratch: folder for the graph with gates.
    """
    folder = scratch / facts.component
    shutil.rmtree(scratch, ignore_errors=True)
    save(with_gates(read(source.graph), switches), folder / "model.onnx")
    shutil.copyfile(source.config, folder / "config.json")
    inputs = source.probe().inputs
    rows = single_rows(inputs)
    some = [rows[0], rows[-1]][: min(_ROWS, len(rows))]
    oracle = find_backend("onnxruntime")
    with oracle.load(EngineSpec.described_by(scratch, facts, "f32"), 1) as engine:
        plain, noise = noise_of_each(engine, some, len(switches), lambda name, compute: compute())
    signal = float(plain.double().square().sum())
    alone = [decibels(signal, float(each)) for each in noise.sum(1)]
    worst = min(range(len(switches)), key=lambda index: alone[index])
    shutil.rmtree(scratch, ignore_errors=True)
    return switches[worst], alone[worst]
