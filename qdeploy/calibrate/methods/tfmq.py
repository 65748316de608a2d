"""TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503; Temporal Feature Matters, TPAMI 2025, arXiv 2407.19547).

What depends on the timestep alone is calibrated on its own: the temporal information block h, g_0 ... g_n is
one reconstruction unit (section 3.1), its activations have a scale and a zero point for every timestep
(finite set calibration, section 3.2), and each of its features may be a quantized table instead, whichever is
closer to full precision (the journal's disturbance-aware selection). Departures from the released code:

- the block is found by tracing, not by name, and is learned from all timesteps of training, each once; the
  code draws from thousands of rows that hold 20 to 50 distinct timesteps;
- parameters are looked up by the timestep's value; the code counts calls or assumes a stride, and so chooses
  others than were calibrated where the steps do not divide 1000;
- the rest has static scales, as in the paper; the code has one for every timestep everywhere, which here is
  any method's ``timestep_groups``;
- reconstruction elsewhere leaves the block as it is.

Where classes or other conditions enter the embedding, the block is what comes before they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.rounding import default_rate, learn_rounding, undecided
from qdeploy.calibrate.session import HELD_OUT, Session
from qdeploy.network.current_timestep import current_timestep_of, midpoints
from qdeploy.network.observe import ModuleCall, observing
from qdeploy.quant.feature_table import FeatureTable
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.recipe.formats import int8
from qdeploy.recipe.stages import ROUNDINGS, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say
from qdeploy.system.suggest import unknown

MODES = ("selected", "block", "cache")


@dataclass
class TemporalProblem:
    """The temporal information block as a reconstruction unit with one output for each feature.

    Its error is TIAR's: the squared distance of every feature from full precision, summed over features.
    """

    session: Session
    timesteps: Tensor
    targets: dict[str, Tensor]
    learn: Tensor
    judge: Tensor

    @classmethod
    def open(cls, session: Session) -> TemporalProblem:
        """The problem over every timestep that the network may be called with."""
        timesteps = session.all_timesteps().to(session.device)
        with torch.no_grad(), session.teacher():
            targets = session.structure.time.together(session.denoiser, timesteps)
        numbers = torch.arange(len(timesteps))
        held = numbers % HELD_OUT == HELD_OUT - 1
        if not held.any():
            return cls(session, timesteps, targets, numbers, numbers)
        return cls(session, timesteps, targets, numbers[~held], numbers[held])

    def error(self, rows: Tensor, p: float) -> Tensor:
        """``sum_i mean_t |g_i(h(t)) - g^_i(h^(t))|^p`` over some timesteps, by their numbers."""
        with self.session.weights_only():
            features = self.session.structure.time.together(self.session.denoiser, self.timesteps[rows])
        errors = [
            (features[name] - self.targets[name][rows]).abs().pow(p).flatten(1).sum(1).mean()
            for name in features
        ]
        return torch.stack(errors).sum()

    def judged(self, p: float) -> float:
        """The error on the timesteps that nothing was learned from."""
        with torch.no_grad():
            return float(self.error(self.judge, p))


@dataclass(frozen=True)
class TemporalRounding(Stage):
    """Learn the rounding of the temporal information block (TIAR, section 3.1, equation 8).

    Attributes:
        weight: lambda, the weight of the rounding regulariser.
        warmup: share of the steps without regulariser.
        lr: Adam's learning rate; 0 chooses the paper's 1e-3, raised where there are fewer steps.
        steps: of the optimiser; None leaves it to the effort.
    """

    name = "temporal-rounding"
    description = "AdaRound of the temporal information block, over all timesteps"
    needs = (WEIGHT_SCALES,)
    gives = (ROUNDINGS,)
    uniform = True

    weight: float = 0.01
    warmup: float = 0.2
    lr: float = 0.0
    steps: int | None = None

    def run(self, session: Session) -> None:
        """Decide the codes of the block."""
        layers = _block(session)
        steps = self.steps or session.effort.rounding

        def compute() -> None:
            gain = learn_rounding(
                TemporalProblem.open(session),
                undecided(layers.values()),
                steps=steps,
                batch=session.effort.batch,
                lr=self.lr or default_rate(steps),
                generator=session.generator("temporal"),
                weight=self.weight,
                warmup=self.warmup,
            )
            say(f"  temporal information block: {gain:.2f} times the error of rounding to nearest", level=2)

        session.once("block", compute)


@dataclass(frozen=True)
class FiniteSetRanges(Stage):
    """A scale and, where the format has one, a zero point for every timestep (section 3.2).

    For every quantized activation of the temporal information block: the smallest and largest value at that
    timestep, weights quantized and activations float.
    """

    name = "finite-set-ranges"
    description = "scale and zero point of the time path's activations for every timestep"
    needs = (WEIGHT_SCALES,)

    def run(self, session: Session) -> None:
        """Set the scales of the block's activations."""
        layers = _block(session)
        if not any(layer.input_quantizers for layer in layers.values()):
            return

        def compute() -> None:
            timesteps = session.all_timesteps()
            edges = midpoints(timesteps.float())
            found = {q: list[Tensor]() for layer in layers.values() for q in layer.activation_quantizers}

            def before(call: ModuleCall) -> None:
                assert isinstance(call.module, ActivationQuantizer)
                found[call.module].append(torch.stack(call.input.aminmax()).cpu())

            observed = {str(number): quantizer for number, quantizer in enumerate(found)}
            with torch.no_grad(), session.weights_only(), observing(observed, before):
                session.structure.time(session.denoiser, timesteps.to(session.device))
            for quantizer, extremes in found.items():
                low, high = torch.stack(extremes, 1)
                # a tensor that several layers read is seen once for each of them, at every timestep
                low, high = low.view(len(timesteps), -1).amin(1), high.view(len(timesteps), -1).amax(1)
                quantizer.set(*to_scale(low, high, quantizer.format), edges)

        session.once("finite-set", compute)


@dataclass(frozen=True)
class TemporalSelection(Stage):
    """Choose for every feature between the quantized block and a quantized table of the feature.

    What is compared is the relative error of the feature, averaged over all timesteps; it is kept with the
    checkpoint. The table has a scale and a zero point for every timestep; a tie goes to the table, which
    costs nothing at run time.

    Attributes:
        mode: ``selected``; ``block`` or ``cache`` to have the one or the other for every feature.
    """

    name = "temporal-selection"
    description = "each temporal feature from the quantized block or from a table, whichever is closer"
    needs = (WEIGHT_SCALES,)
    uniform = True

    mode: str = "selected"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: there is no such mode.
        """
        super().__post_init__()
        if self.mode not in MODES:
            raise UsageError(unknown("mode of temporal-selection", self.mode, MODES))

    def run(self, session: Session) -> None:
        """Replace features by tables where those are closer, and write the report."""
        layers = _block(session)
        time = session.structure.time
        features = [name for name in time.features if name in layers]

        def compare() -> dict[str, Tensor]:
            timesteps = session.all_timesteps().to(session.device)
            with torch.no_grad():
                block = time(session.denoiser, timesteps)
                with session.teacher():
                    exact = time(session.denoiser, timesteps)
            found: dict[str, Tensor] = {"timesteps": timesteps.float().cpu()}
            for name in features:
                target = exact[name]
                table = _table(session, layers[name], target)
                for kind, value in (("block", block[name]), ("cache", table.values())):
                    found[f"{name}.{kind}.error"] = relative_error(value, target).cpu()
                    found[f"{name}.{kind}.cosine"] = cosine(value, target).cpu()
                found[f"{name}.block.mismatches"] = mismatches(block[name], target).sum().cpu()
            return found

        compared = session.draft.step(f"{session.stage}-compared", compare)
        report = {}
        for name in features:
            errors = {kind: float(compared[f"{name}.{kind}.error"].mean()) for kind in ("block", "cache")}
            best = "block" if errors["block"] < errors["cache"] else "cache"
            report[name] = {
                "chosen": best if self.mode == "selected" else self.mode,
                "relative_error": errors,
                "worst_cosine": {k: float(compared[f"{name}.{k}.cosine"].min()) for k in ("block", "cache")},
                "mismatched_timesteps": int(compared[f"{name}.block.mismatches"]),
            }

        def compute() -> None:
            timesteps = session.all_timesteps().to(session.device)
            with torch.no_grad(), session.teacher():
                exact = time(session.denoiser, timesteps)
            for name, entry in report.items():
                if entry["chosen"] == "cache":
                    layers[name].table = _table(session, layers[name], exact[name])

        session.once("selection", compute)
        session.draft.json(f"{session.component}/temporal.json", {"mode": self.mode, "features": report})
        cached = sum(entry["chosen"] == "cache" for entry in report.values())
        say(f"temporal features: {cached} of {len(report)} are read from tables, the others computed")


def relative_error(value: Tensor, target: Tensor) -> Tensor:
    """``|value - target| / |target|`` at each timestep; [T, ...] to [T]."""
    norm = target.flatten(1).norm(dim=1).clamp(min=torch.finfo(target.dtype).tiny)
    error: Tensor = (value - target).flatten(1).norm(dim=1) / norm
    return error


def cosine(value: Tensor, target: Tensor) -> Tensor:
    """Cosine of a feature and its quantized self at each timestep; [T, ...] to [T]."""
    return nn.functional.cosine_similarity(value.flatten(1), target.flatten(1), dim=1)


def mismatches(value: Tensor, target: Tensor) -> Tensor:
    """Where a quantized feature is closer to that of another timestep than to its own; [T, ...] to [T] bool.

    The paper's temporal information mismatch (section 2.2): closeness is the cosine.
    """
    quantized = nn.functional.normalize(value.flatten(1).double(), dim=1)
    exact = nn.functional.normalize(target.flatten(1).double(), dim=1)
    closest = (quantized @ exact.T).argmax(1)
    own: Tensor = torch.arange(len(closest), device=closest.device)
    return torch.ne(closest, own)


def _block(session: Session) -> dict[str, QuantizedLayer]:
    """The quantized layers of the temporal information block, by path."""
    layers = [layer for layer in session.layers if layer.path in session.structure.time.layers]
    if not layers:
        raise UsageError(
            f"the coverage {session.recipe.coverage} quantizes nothing that depends on the timestep alone: "
            "choose --coverage portable-time"
        )
    return dict(zip((layer.path for layer in layers), session.quantized(layers), strict=True))


def _table(session: Session, layer: QuantizedLayer, features: Tensor) -> FeatureTable:
    edges = midpoints(session.all_timesteps().float()).to(features.device)
    number_format = next((q.format for q in layer.activation_quantizers), int8)
    return FeatureTable.quantized(features, edges, current_timestep_of(session.denoiser), number_format)


METHOD = Method(
    "tfmq",
    "TFMQ-DM, Huang et al., CVPR 2024, arXiv 2311.16503; TPAMI 2025, arXiv 2407.19547",
    "the time path as one block, with a range for every timestep, or tables; AdaRound elsewhere",
    (
        WeightRanges("lp"),
        TemporalRounding(),
        AdaRound(),
        ActivationRanges("running"),
        FiniteSetRanges(),
        TemporalSelection(),
    ),
    coverage="portable-time",
)
