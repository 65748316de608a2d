"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304).

Calibration data along the sampling trajectory (section 3.3.1; see `qdeploy.calibration_set.collect`), split
shortcuts (section 3.3.2; a matter of coverage), AdaRound by reconstruction of units, and learned steps of
activations. Departures from the released code, each for a reason:

- units come in execution order and see inputs from units that are done; the code walks the module tree;
- dropout is off throughout; the code leaves it on;
- the rounding regulariser covers both halves of a split layer; the code's covers the first;
- activation steps are learned as logarithms, so they stay positive and one learning rate suits all; they
  see quantized inputs; and the result is kept only if unseen rows agree;
- with fewer steps than the paper's 20000 the learning rate is higher, so that roundings still settle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from qdeploy.calibrate.bias_correction import correct_bias
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.precision import PRECISIONS, products_in
from qdeploy.calibrate.reconstruct import UnitProblem, optimize
from qdeploy.calibrate.rounding import default_rate, learn_rounding, undecided
from qdeploy.calibrate.session import HELD_OUT, Session
from qdeploy.calibrate.tuning import learned_scales
from qdeploy.calibrate.unit_walk import UnitWalk
from qdeploy.network.roles import Layer
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.state import quantizers
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ACTIVATION_SCALES, ROUNDINGS, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say, track
from qdeploy.system.suggest import unknown

BFLOAT16_STEP = (
    0.6  # of the time of a step in float32, where a processor multiplies bfloat16: measured 0.5 to 0.9
)
PASSES = 2 + 2 / HELD_OUT  # what each unit is given and should return, and its judgement before and after


@dataclass(frozen=True)
class AdaRound(Stage):
    """Learn the rounding of every weight, unit by unit (AdaRound, Nagel et al., ICML 2020, arXiv 2004.10568).

    Weights whose rounding an earlier stage has decided stay as they are, unless it is to be refined: TFMQ-DM keeps
    its temporal information block out of the blocks that it reaches into (section 3.1).

    Attributes:
        weight: lambda, the weight of the rounding regulariser.
        warmup: share of the steps without regulariser.
        lr: Adam's learning rate; 0 chooses the paper's 1e-3, raised where there are fewer steps.
        steps: of the optimiser for each unit; None leaves it to the effort.
        settle: a unit is done once its held-out error has not fallen by this share in two tenths of the steps, and
            the best is kept; None for all steps.
        refine: learn on from the roundings that an earlier stage, such as ``gptq``, has decided.
        bias: move the mean error of each unit's output into a bias, before the next unit is rounded
            (`qdeploy.calibrate.bias_correction`).
        precision: ``bfloat16`` computes the steps' products in it, for processors and GPUs that multiply it faster,
            and records in float16; the judgement on held-out rows computes in float32 all the same.
    """

    name = "round-weights"
    description = "AdaRound by reconstruction of units"
    needs = (WEIGHT_SCALES,)
    gives = (ROUNDINGS,)

    weight: float = 0.01
    warmup: float = 0.2
    lr: float = 0.0
    steps: int | None = None
    settle: float | None = None
    refine: bool | None = None
    bias: bool | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: fewer than one step, an impossible share, or an unknown precision.
        """
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"the steps of round-weights must be at least 1, not {self.steps}")
        if self.settle is not None and not 0 <= self.settle < 1:
            raise UsageError(f"settle of round-weights must be from 0 to 1, not {self.settle}")
        if self.precision not in (None, *PRECISIONS):
            raise UsageError(unknown("precision of round-weights", self.precision, PRECISIONS))

    def run(self, session: Session) -> None:
        """Decide the codes of all weights."""
        steps = self.steps or session.effort.rounding
        rate, walk = self.lr or default_rate(steps), UnitWalk(session, half=self.precision == "bfloat16")
        for number, (unit, layers) in enumerate(track(list(session.units.items()), "rounding")):

            def compute(unit: str = unit, layers: list[Layer] = layers) -> None:
                modules = session.quantized(layers)
                if not (self.refine or undecided(modules)):
                    return
                with session.weights_only():
                    problem = walk.problem(unit)
                    gain = round_unit(
                        session, problem, modules, f"round/{unit}", steps, rate, self.weight, self.warmup,
                        settle=self.settle, refine=bool(self.refine), precision=self.precision,
                    )  # fmt: skip
                    if self.bias:
                        correct_bias(problem, modules)
                before = "the roundings that were there" if self.refine else "rounding to nearest"
                say(f"  {unit}: {gain:.2f} times the error of {before}", level=2)

            session.once(f"{number:04d}", compute, prefix=unit)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        share = BFLOAT16_STEP if self.precision == "bfloat16" else 1.0
        return PASSES, share * (self.steps or effort.rounding)


def round_unit(
    session: Session,
    problem: UnitProblem,
    layers: list[QuantizedLayer],
    name: str,
    steps: int,
    rate: float,
    weight: float,
    warmup: float,
    *,
    settle: float | None = None,
    refine: bool = False,
    precision: str | None = None,
) -> float:
    """Round one unit; returns the ratio of its held-out error to that of what was there before."""
    with products_in(precision, problem.run.device):
        return learn_rounding(
            problem,
            [pair for layer in layers for pair in layer.weight_pairs()] if refine else undecided(layers),
            steps=steps,
            batch=session.effort.batch,
            lr=rate,
            generator=session.generator(name),
            weight=weight,
            warmup=warmup,
            settle=settle,
        )


@dataclass(frozen=True)
class LearnScales(Stage):
    """Learn the steps of activations, unit by unit, with the weights fixed (LSQ, Esser et al. 2020).

    A unit keeps its new steps only if they lower its error on rows that were not learned from.

    Attributes:
        lr: Adam's learning rate for the logarithm of a step.
        p: exponent of the output error.
        steps: of the optimiser for each unit; None leaves it to the effort.
    """

    name = "learn-scales"
    description = "learned steps of activations, kept if unseen rows agree"
    needs = (ACTIVATION_SCALES,)
    gives = (ACTIVATION_SCALES,)

    lr: float = 0.01
    p: float = 2.4
    steps: int | None = None

    def run(self, session: Session) -> None:
        """Change the scales of activations."""
        if session.recipe.calibrated is None:
            return
        kept, walk = 0, UnitWalk(session)
        for number, unit in enumerate(track(list(session.units), "activation scales")):

            def compute(unit: str = unit) -> None:
                nonlocal kept
                kept += learn_unit(session, walk.problem(unit), unit, self.lr, self.p, self.steps)

            session.once(f"{number:04d}", compute, prefix=unit)
        say(f"learned activation scales were kept in {kept} of {len(session.units)} units", level=2)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return PASSES, self.steps or effort.scales


def learn_unit(
    session: Session, problem: UnitProblem, unit: str, lr: float, p: float, steps: int | None
) -> bool:
    """Learn the activation scales of one unit; the old ones are put back if held-out rows do not gain.

    Args:
        session: the calibration.
        problem: the unit's inputs and outputs.
        unit: its path.
        lr: Adam's learning rate for the logarithm of a scale.
        p: exponent of the output error.
        steps: of the optimiser; None for those of the effort.

    Returns:
        Whether the learned scales were kept.
    """
    own = quantizers(session.denoiser, unit)
    found = {
        name: quantizer
        for name, quantizer in own
        if isinstance(quantizer, ActivationQuantizer) and not quantizer.format.two_levels
    }
    if not found:
        return False
    before = {name: quantizer.scale.clone() for name, quantizer in found.items()}
    baseline = problem.judged(p)
    logs = {name: nn.Parameter(scale.log()) for name, scale in before.items()}
    generator, steps = session.generator(f"scales/{unit}"), steps or session.effort.scales
    with learned_scales(found, logs):
        optimize(problem, list(logs.values()), steps, session.effort.batch, lr, generator, p, cosine=True)
    for name, quantizer in found.items():
        quantizer.scale = logs[name].detach().exp()
    if math.isfinite(reached := problem.judged(p)) and reached < baseline:
        return True
    for name, quantizer in found.items():
        quantizer.scale = before[name]
    return False


METHOD = Method(
    "qdiffusion",
    "Q-Diffusion, Li et al., ICCV 2023, arXiv 2302.04304",
    "trajectory calibration, split shortcuts, AdaRound by units, learned activation steps",
    (
        WeightRanges("lp"),
        AdaRound(),
        ActivationRanges("lp"),
        LearnScales(),
    ),
)
