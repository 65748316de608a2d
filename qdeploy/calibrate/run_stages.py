"""The stages of a recipe: what they will cost, and their run one after the other."""

from __future__ import annotations

import time
from math import prod

import torch

from qdeploy.calibrate.methods.minmax import round_to_nearest
from qdeploy.calibrate.session import Session
from qdeploy.model.inputs import denoise
from qdeploy.quant.layer import quantized_layers
from qdeploy.system.estimate import Estimate
from qdeploy.system.memory import peak_memory

LONG_CALL = 2.0  # seconds
# Seconds that a weight takes on one core: to be read, rounded and written; and to find a range by search.
QUICK_WEIGHT, SEARCHED_WEIGHT = 2e-8, 2e-7


def estimate_cost(session: Session) -> Estimate:
    """Time and memory that the stages will take, from one timed batch; of weights alone, from their number.

    The first call is slow, because memory and kernels are being prepared; where it takes seconds, that is little
    of them, and it is not repeated. A stage says how often it runs the network over all rows, how many training
    steps it makes per unit, and what it computes with matrices besides; all units together cost about three forward
    passes per step, and an operation takes as long as in the network.
    """
    if not session.recipe.needs_rows:
        return _cost_of_weights(session)
    rows = session.rows()
    batch = session.inputs(rows[: session.batch])
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            denoise(session.denoiser, batch)
            forward = time.perf_counter() - began
            if forward > LONG_CALL:
                break
    passes, steps = 0.0, 0.0
    for stage in session.recipe.stages:
        stage_passes, stage_steps = stage.cost(len(session.units), session.effort)
        passes, steps = passes + stage_passes, steps + stage_steps
    count = min(session.batch, len(rows))
    learned = min(session.effort.batch, len(rows))  # of one step
    operation = forward / max(1, count * sum(layer.macs for layer in session.structure.layers))
    seconds = forward / count * (passes * len(rows) + 3 * steps * learned)
    seconds += operation * sum(stage.operations(session) for stage in session.recipe.stages)
    weights = sum(parameter.numel() for parameter in session.denoiser.parameters())
    row = sum(tensor[0].numel() * tensor.element_size() for tensor in batch.values() if tensor.ndim)
    recorded = min(session.max_memory, 128 * row * len(rows)) if steps else 0
    # What the batch took; then codes of a byte for each weight, and their packed copy until it is written.
    reached = peak_memory() or 5 * weights
    besides = max(stage.memory(session) for stage in session.recipe.stages)
    return Estimate(seconds, reached + 2 * weights + recorded + int(besides))


def _cost_of_weights(session: Session) -> Estimate:
    """Of stages that look at weights alone: one layer after the other, then the probe's passes."""
    counts = [sum(map(prod, layer.part_shapes())) for layer in quantized_layers(session.denoiser).values()]
    passes = 2 * len(session.data) * session.pass_seconds
    searched = sum(stage.cost(0, session.effort)[0] > 0 for stage in session.recipe.stages)
    seconds = sum(counts) * (QUICK_WEIGHT + searched * SEARCHED_WEIGHT)
    reached = peak_memory() or 0
    # The packed codes, once more while they are written, and the largest layer in floats a few times.
    return Estimate(passes + seconds, reached + 2 * sum(counts) + 16 * max(counts, default=0))


def run_stages(session: Session) -> None:
    """Run all stages of the session's recipe; in the end each weight is a code."""
    clock = session.draft.time
    for number, stage in enumerate(session.recipe.stages):
        session.stage = f"{number}-{stage.name}"
        if clock is not None:
            clock.label(session.stage)
        stage.run(session)
    if clock is not None:
        clock.label("")

    def finish_rounding() -> None:
        for layer in quantized_layers(session.denoiser).values():
            round_to_nearest(layer)
            layer.tuned = None  # its codes say it

    session.stage = "end"
    session.once("rounded", finish_rounding)
