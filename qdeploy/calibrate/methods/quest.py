"""QuEST (Wang et al., ICCV 2025, arXiv 2402.03666).

A small share of the weights is tuned, so that what they give can be quantized: temporal layer alignment
(TLA), then critical module alignment (CMA), each with the activation scales that belong to it. Losses as in
section 3.3: ``L_TLA = sum_l E_t |O_l - O^_l|^2`` over the layers that bring the time embedding into blocks,
``L_CMA`` alike over the layers of attention and feed-forward, and ``L_G = E_t |eps_fp - eps_q|^2``, which
counts twice. The tuned weights are ordinary integer weights in the end: they cost an engine nothing.

The roles are found by tracing. Temporal features are quantized by the coverage ``portable-time``, which is
the method's own; with a coverage that leaves the time path in float, TLA has nothing to align and says so.

Departures from the released code, each for a reason:

- one scale for all timesteps, as the paper has it, or one for each of a recipe's ``timestep_groups``; the
  code has one for every kept timestep, passes over steps that it does not find, and leaves old scales there;
- a weight that moves is rounded again, straight through, from the codes that were decided before; in the
  code the decisions of AdaRound stay while weights cross their floors;
- weights move in steps of their own grid, and learning rates come from how far a run may move a number, so
  that one option suits 4 and 8 bits and any number of steps;
- scales are learned as logarithms; they stay positive;
- each layer's error is relative to the layer's own size, and the local loss is their mean; in the code's
  loop over K layers the global loss is added K times, which amounts to the same balance;
- timesteps are mixed in every batch; the code walks through them, and the last ones weigh most;
- dropout is off; the code's training mode turns it on;
- a stage's result is kept only if it does not worsen the prediction on images that nothing was learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qdeploy.calibrate.learning import journal_of, learn
from qdeploy.calibrate.methods.minmax import round_to_nearest
from qdeploy.calibrate.prediction_loss import Losses
from qdeploy.calibrate.session import HELD_OUT, Session
from qdeploy.calibrate.tuning import Tuning
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.state import code_shapes, quantizers, read_state, write_state
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ACTIVATION_SCALES, ROUNDINGS, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say


def align_time(
    session: Session,
    *,
    reach: float = 1.0,
    reach_scales: float = 0.1,
    local: float = 1.0,
    overall: float = 2.0,
    steps: int = -1,
    micro_batch: int = 8,
) -> None:
    """Temporal layer alignment (section 3.3): the projections of the time embedding, and their inputs' scales.

    Args:
        session: the calibration.
        reach: how many steps of its grid a weight may move.
        reach_scales: how much the logarithm of a scale may change.
        local: weight of the layers' own errors.
        overall: weight of the error of the network's prediction.
        steps: of the optimiser; -1 leaves it to the effort.
        micro_batch: rows whose activations are held at a time.

    Raises:
        UsageError: an option makes no sense.
    """
    features = _modules(session, session.structure.time.features)
    layers = {path: layer for path, layer in features.items() if layer.table is None}
    if not layers:
        say(
            f"align-time has nothing to align: with coverage {session.recipe.coverage} no temporal feature is "
            "computed from quantized weights"
        )
        return
    _align(session, layers, _time_scales(session), reach, reach_scales, local, overall, steps, micro_batch)


def align_attention(
    session: Session,
    *,
    reach: float = 1.0,
    reach_scales: float = 0.1,
    local: float = 1.0,
    overall: float = 2.0,
    steps: int = -1,
    micro_batch: int = 8,
) -> None:
    """Critical module alignment (section 3.3): attention and feed-forward, and all scales but those of time.

    Args:
        session: the calibration.
        reach: as of `align_time`, like all that follow.
        reach_scales: likewise.
        local: likewise.
        overall: likewise.
        steps: likewise.
        micro_batch: likewise.

    Raises:
        UsageError: an option makes no sense.
    """
    layers = _modules(session, [layer.path for layer in session.layers if layer.attention])
    if not layers:
        say("align-attention has nothing to align: no quantized layer belongs to an attention")
        return
    of_time = {id(quantizer) for quantizer in _time_scales(session).values()}
    scales = {name: q for name, q in _scales(session).items() if id(q) not in of_time}
    _align(session, layers, scales, reach, reach_scales, local, overall, steps, micro_batch)


def align_end(
    session: Session,
    *,
    reach: float = 1.0,
    reach_scales: float = 0.1,
    steps: int = -1,
    micro_batch: int = 8,
) -> None:
    """The last unit and its scales against ``L_G`` alone: what reconstruction by units cannot see.

    A unit's own error says nothing of what reads it. Behind the last one only the float end of the network
    follows, which may amplify the one direction in which the unit errs.

    Args:
        session: the calibration.
        reach: as of `align_time`, like all that follow.
        reach_scales: likewise.
        steps: likewise.
        micro_batch: likewise.

    Raises:
        UsageError: an option makes no sense.
    """
    last = list(session.units.values())[-1]
    layers = _modules(session, [layer.path for layer in last])
    scales = _scales_of(session, layers)
    _align(session, layers, scales, reach, reach_scales, 0.0, 1.0, steps, micro_batch)


def _align(
    session: Session,
    layers: Mapping[str, QuantizedLayer],
    scales: Mapping[str, ActivationQuantizer],
    reach: float,
    reach_scales: float,
    local: float,
    overall: float,
    steps: int,
    micro_batch: int,
) -> None:
    given = {"reach": reach, "reach_scales": reach_scales, "local": local, "overall": overall}
    for name, value in given.items():
        if not value >= 0:
            raise UsageError(f"the option {name} of an alignment cannot be {value}: it is at least 0")
    if micro_batch < 1:
        raise UsageError(f"a micro-batch holds at least one row, not {micro_batch}")
    steps = session.effort.tuning if steps < 0 else steps
    outcome = f"{session.stage}-outcome"

    def compute() -> None:
        for layer in layers.values():
            round_to_nearest(layer)
        everything = session.rows()
        learned_from, judged_by = (
            [everything[i] for i in part.tolist()] for part in session.split(everything)
        )
        losses = Losses(session, list(layers), local, overall)
        stood = read_state(session.denoiser)
        before = losses.judged(judged_by, session.effort.batch)
        tuning = Tuning(layers, scales)
        if steps:
            with tuning.installed():
                learn(
                    session,
                    tuning,
                    losses,
                    learned_from,
                    steps=steps,
                    lr=2 * reach / steps,  # a cosine's mean is a half
                    lr_scales=2 * reach_scales / steps,
                    micro_batch=micro_batch,
                )
            tuning.decide()
        after = losses.judged(judged_by, session.effort.batch)
        kept = after <= before
        changed = tuning.changed_codes()
        if not kept:
            write_state(session.denoiser, stood, code_shapes(session.denoiser))
        told = [before, after, float(kept), float(changed)]
        session.draft.step(outcome, lambda: {"told": torch.tensor(told, dtype=torch.float64)})

    session.once("aligned", compute)
    session.draft.forget(journal_of(session.stage))
    before, after, kept, changed = (session.draft.saved(outcome) or {})["told"].tolist()
    tuned = sum(layer.weight.numel() for layer in layers.values())
    share = tuned / sum(parameter.numel() for parameter in session.denoiser.parameters())
    session.report.setdefault("aligned", {})[session.stage] = {
        "layers": len(layers),
        "parameters": tuned,
        "share": share,
        "scales": len(scales),
        "steps": steps,
        "changed_codes": int(changed),
        "held_out_error": {"before": before, "after": after},
        "kept": bool(kept),
    }
    say(
        f"{session.stage.partition('-')[2]}: tuned {len(layers)} layers, {share:.1%} of all parameters; error "
        f"on held-out images {before:.3g}, then {after:.3g}"
        + ("" if kept else ": not better, so everything is as it was before")
    )


def _modules(session: Session, paths: Sequence[str]) -> dict[str, QuantizedLayer]:
    """Those of some layers that have quantized weights, by path."""
    covered = [layer for layer in session.layers if layer.path in paths]
    return dict(zip((layer.path for layer in covered), session.quantized(covered), strict=True))


def _scales(session: Session) -> dict[str, ActivationQuantizer]:
    found = quantizers(session.denoiser)
    return {name: quantizer for name, quantizer in found if isinstance(quantizer, ActivationQuantizer)}


def _time_scales(session: Session) -> dict[str, ActivationQuantizer]:
    """The quantizers of what temporal features are computed from."""
    return _scales_of(session, _modules(session, session.structure.time.features))


def _scales_of(session: Session, layers: Mapping[str, QuantizedLayer]) -> dict[str, ActivationQuantizer]:
    """The quantizers of what some layers read, by name."""
    theirs = {id(q) for layer in layers.values() for q in layer.activation_quantizers}
    return {name: quantizer for name, quantizer in _scales(session).items() if id(quantizer) in theirs}


def _cost(options: Mapping[str, Any], units: int, effort: Effort) -> tuple[float, float]:
    """The steps run teacher, student, gradient and recomputation; held-out rows are judged twice."""
    return 4 / HELD_OUT, effort.tuning * 5 / 3


def _cost_of_the_end(options: Mapping[str, Any], units: int, effort: Effort) -> tuple[float, float]:
    """Likewise, but the gradient ends where it has hardly begun."""
    return 4 / HELD_OUT, effort.tuning * 2.5 / 3


def _alignment(
    name: str,
    run: Callable[..., None],
    description: str,
    cost: Callable[[Mapping[str, Any], int, Effort], tuple[float, float]] = _cost,
) -> Stage:
    """A stage that tunes weights and scales which are there already."""
    scales, results = (WEIGHT_SCALES, ACTIVATION_SCALES), (ROUNDINGS, ACTIVATION_SCALES)
    return Stage(name, run, description, cost, needs=scales, gives=results)


STAGES = (
    _alignment(
        "align-time",
        align_time,
        "tune the projections of the time embedding and their scales (QuEST's TLA)",
    ),
    _alignment(
        "align-attention",
        align_attention,
        "tune attention and feed-forward, and all other activation scales (QuEST's CMA)",
    ),
    _alignment(
        "align-end",
        align_end,
        "tune the last unit and its activation scales against the prediction (QuEST's global loss alone)",
        _cost_of_the_end,
    ),
)

METHOD = Method(
    "quest",
    "QuEST, Wang et al., ICCV 2025, arXiv 2402.03666",
    "AdaRound, then a few per cent of the weights tuned: the time projections, then attention and feed-forward",
    (
        ("weight-ranges", {"finder": "lp"}),
        ("round-weights", {}),
        ("activation-ranges", {"finder": "lp"}),
        ("align-time", {}),
        ("align-attention", {}),
    ),
    coverage="portable-time",
)
