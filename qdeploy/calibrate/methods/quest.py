"""QuEST (Wang et al., ICCV 2025, arXiv 2402.03666).

A small share of the weights is tuned, so that their outputs can be quantized: temporal layer alignment
(TLA), then critical module alignment (CMA), each with the activation scales that belong to it. Losses as in
section 3.3: ``L_TLA = sum_l E_t |O_l - O^_l|^2`` over the layers that bring the time embedding into blocks,
``L_CMA`` in the same way over the layers of attention and feed-forward, and ``L_G = E_t |eps_fp - eps_q|^2``, which
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdeploy.calibrate.learning import journal_of, learn
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges, round_to_nearest
from qdeploy.calibrate.methods.qdiffusion import AdaRound
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


@dataclass(frozen=True)
class _Alignment(Stage):
    """Tune weights and scales that exist already."""

    needs = (WEIGHT_SCALES, ACTIVATION_SCALES)
    gives = (ROUNDINGS, ACTIVATION_SCALES)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: one makes no sense.
        """
        super().__post_init__()
        for name in ("reach", "reach_scales", "local", "overall"):
            if not (value := self.options.get(name, 0)) >= 0:
                raise UsageError(f"the option {name} of {self.name} cannot be {value}: it is at least 0")
        if (rows := self.options["micro_batch"]) < 1:
            raise UsageError(f"a micro-batch holds at least one row, not {rows}")

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """The steps run teacher, student, gradient and recomputation; held-out rows are judged twice."""
        return 4 / HELD_OUT, effort.tuning * 5 / 3


@dataclass(frozen=True)
class AlignTime(_Alignment):
    """Temporal layer alignment (section 3.3): the projections of the time embedding, and their inputs' scales.

    Attributes:
        reach: how many steps of its grid a weight may move.
        reach_scales: how much the logarithm of a scale may change.
        local: weight of the layers' own errors.
        overall: weight of the error of the network's prediction.
        steps: of the optimiser; -1 leaves it to the effort.
        micro_batch: rows whose activations are held at a time.
    """

    name = "align-time"
    description = "tune the projections of the time embedding and their scales (QuEST's TLA)"

    reach: float = 1.0
    reach_scales: float = 0.1
    local: float = 1.0
    overall: float = 2.0
    steps: int = -1
    micro_batch: int = 8

    def run(self, session: Session) -> None:
        """Tune what temporal features are computed from."""
        features = layers_at(session, session.structure.time.features)
        layers = {path: layer for path, layer in features.items() if layer.table is None}
        if not layers:
            say(
                f"align-time has nothing to align: with coverage {session.recipe.coverage} no temporal feature is "
                "computed from quantized weights"
            )
            return
        _align(session, layers, _time_scales(session), **self.options)


@dataclass(frozen=True)
class AlignAttention(_Alignment):
    """Critical module alignment (section 3.3): attention and feed-forward, and all scales but those of time.

    Attributes:
        reach: see `AlignTime`, as for all that follow.
        reach_scales: how much the logarithm of a scale may change.
        local: weight of the layers' own errors.
        overall: weight of the error of the network's prediction.
        steps: of the optimiser; -1 leaves it to the effort.
        micro_batch: rows whose activations are held at a time.
    """

    name = "align-attention"
    description = "tune attention and feed-forward, and all other activation scales (QuEST's CMA)"

    reach: float = 1.0
    reach_scales: float = 0.1
    local: float = 1.0
    overall: float = 2.0
    steps: int = -1
    micro_batch: int = 8

    def run(self, session: Session) -> None:
        """Tune the layers of attention and feed-forward."""
        layers = layers_at(session, [layer.path for layer in session.layers if layer.attention])
        if not layers:
            say("align-attention has nothing to align: no quantized layer belongs to an attention")
            return
        of_time = {id(quantizer) for quantizer in _time_scales(session).values()}
        scales = {name: q for name, q in input_scales(session).items() if id(q) not in of_time}
        _align(session, layers, scales, **self.options)


@dataclass(frozen=True)
class AlignEnd(_Alignment):
    """The last unit and its scales against ``L_G`` alone: what reconstruction by units cannot see.

    A unit's own error says nothing of what reads it. Behind the last one only the float end of the network
    follows, which may amplify the one direction in which the unit errs.

    Attributes:
        reach: how many steps of its grid a weight may move.
        reach_scales: how much the logarithm of a scale may change.
        steps: of the optimiser; -1 leaves it to the effort.
        micro_batch: rows whose activations are held at a time.
    """

    name = "align-end"
    description = (
        "tune the last unit and its activation scales against the prediction (QuEST's global loss alone)"
    )

    reach: float = 1.0
    reach_scales: float = 0.1
    steps: int = -1
    micro_batch: int = 8

    def run(self, session: Session) -> None:
        """Tune the last unit."""
        last = list(session.units.values())[-1]
        layers = layers_at(session, [layer.path for layer in last])
        _align(session, layers, _scales_of(session, layers), **self.options, local=0.0, overall=1.0)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """As of the others, but the gradient ends where it has hardly begun."""
        return 4 / HELD_OUT, effort.tuning * 2.5 / 3


def _align(
    session: Session,
    layers: Mapping[str, QuantizedLayer],
    scales: Mapping[str, ActivationQuantizer],
    *,
    reach: float,
    reach_scales: float,
    local: float,
    overall: float,
    steps: int,
    micro_batch: int,
) -> None:
    steps = session.effort.tuning if steps < 0 else steps

    def compute() -> dict[str, Any]:
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
        return {
            "changed_codes": int(changed),
            "held_out_error": {"before": float(before), "after": float(after)},
            "kept": bool(kept),
        }

    outcome = session.once("aligned", compute)
    session.draft.forget(journal_of(session.stage))
    errors = outcome["held_out_error"]
    tuned = sum(layer.weight.numel() for layer in layers.values())
    share = tuned / sum(parameter.numel() for parameter in session.denoiser.parameters())
    session.report.setdefault("aligned", {})[session.stage] = {
        "layers": len(layers),
        "parameters": tuned,
        "share": share,
        "scales": len(scales),
        "steps": steps,
        **outcome,
    }
    say(
        f"{session.stage.partition('-')[2]}: tuned {len(layers)} layers, {share:.1%} of all parameters; error "
        f"on held-out images {errors['before']:.3g}, then {errors['after']:.3g}"
        + ("" if outcome["kept"] else ": not better, so everything is as it was before")
    )


def layers_at(session: Session, paths: Sequence[str]) -> dict[str, QuantizedLayer]:
    """Those of some layers that have quantized weights, by path."""
    covered = [layer for layer in session.layers if layer.path in paths]
    return dict(zip((layer.path for layer in covered), session.quantized(covered), strict=True))


def input_scales(session: Session) -> dict[str, ActivationQuantizer]:
    """All quantizers of activations, by name."""
    found = quantizers(session.denoiser)
    return {name: quantizer for name, quantizer in found if isinstance(quantizer, ActivationQuantizer)}


def _time_scales(session: Session) -> dict[str, ActivationQuantizer]:
    """The quantizers of what temporal features are computed from."""
    return _scales_of(session, layers_at(session, session.structure.time.features))


def _scales_of(session: Session, layers: Mapping[str, QuantizedLayer]) -> dict[str, ActivationQuantizer]:
    """The quantizers of what some layers read, by name."""
    theirs = {id(q) for layer in layers.values() for q in layer.activation_quantizers}
    return {name: quantizer for name, quantizer in input_scales(session).items() if id(quantizer) in theirs}


METHOD = Method(
    "quest",
    "QuEST, Wang et al., ICCV 2025, arXiv 2402.03666",
    "AdaRound, then a few per cent of the weights tuned: the time projections, then attention and feed-forward",
    (
        WeightRanges("lp"),
        AdaRound(),
        ActivationRanges("lp"),
        AlignTime(),
        AlignAttention(),
    ),
    coverage="portable-time",
)
