"""QNCD (Chu et al., ACM MM 2024, arXiv 2403.19140): smoothing by the timestep embedding, mean errors taken out.

Within: adding or scaling by the timestep's embedding spreads the channels of what the next layer of a residual
block reads. The stage smooth-embeddings divides them by factors S that follow from the embedding alone. From
it: the mean error of the prediction is subtracted while sampling, from the table that measure-errors writes,
or as estimated on the way (`qdeploy.sampling.correction`). Departures from the released code, each for a reason:

- blocks are found by tracing, both kinds of them (`qdeploy.network.modulation`); the code knows one, by position;
- S is positive: of gamma and of the embedding the magnitude is taken. The code's follows their signs, and
  may be 0 or negative;
- a layer is smoothed where that lowers the estimated rounding noise of its weight and its input together: at four
  bits the weight loses more than the input gains (``check: false`` smooths all of them, as the paper does);
- S is the mean over every timestep of training, each once; the code takes the first sample of random batches;
- full precision still convolves the original input with the original weight; the code divides its input too;
- S is stored with the checkpoint; the code computes another one when it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdeploy.calibrate.groups import CHANNELS, input_spreads, of_layer
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.rounding_noise import LEAST_GAIN, rounding_noise
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.smoothing import can_smooth, relative_factors, smooth
from qdeploy.model.inputs import denoise
from qdeploy.network.modulation import ADDITIVE, Modulation, find_modulations
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.stages import ACTIVATION_SCALES, RESULTS, WEIGHT_SCALES, Method, Stage
from qdeploy.store.artifact import CORRECTION
from qdeploy.store.correction_table import CorrectionTable
from qdeploy.system.progress import say, track

EPSILON = 1e-3


@dataclass(frozen=True)
class SmoothEmbeddings(Stage):
    """Smooth the layers that read what the embedding was added to or scaled (section 3.1).

    Attributes:
        strength: the exponent of S; 1 is the paper's, less leaves more to the weights.
        check: leave layers whose estimated rounding noise, of weights and input together, would not fall.
    """

    name = "smooth-embeddings"
    description = "smoothing of layers that read what the timestep's embedding was added to or scaled"
    spoils = RESULTS

    strength: float = 1.0
    check: bool = True

    def run(self, session: Session) -> None:
        """Set the smoothing of layers that read an embedding."""
        layers = quantized_layers(session.denoiser)

        def compute() -> dict[str, int]:
            with torch.no_grad(), session.teacher():
                places = find_modulations(session.denoiser, session.inputs(session.rows()[:1]))
                outputs = _projections(session, {place.projection for place in places})
            wanted: list[tuple[dict[str, QuantizedLayer], Tensor]] = []
            for place in places:
                factors = smoothing_factors(place, outputs[place.projection]).pow(self.strength)
                readers = {path: layers[path] for path in place.layers if path in layers}
                fitting = (
                    can_smooth(layer) and len(factors) == layer.weight.shape[1] for layer in readers.values()
                )
                if readers and all(fitting):
                    wanted.append((readers, factors))
            chosen = _quieter(session, wanted) if self.check else wanted
            for readers, factors in chosen:
                for layer in readers.values():
                    smooth(layer, factors)
            count, able = (sum(len(readers) for readers, _ in some) for some in (chosen, wanted))
            say(
                f"{count} of the {able} quantized layers that read the timestep's embedding are smoothed by it"
                + (
                    ""
                    if count == able
                    else "; for the others its factors are not worth what they do to weights"
                )
            )
            return {"layers": count, "read_an_embedding": able}

        session.report["smoothed_by_embedding"] = session.once("smoothing", compute)


def _quieter(
    session: Session, wanted: Sequence[tuple[dict[str, QuantizedLayer], Tensor]]
) -> list[tuple[dict[str, QuantizedLayer], Tensor]]:
    """Those families of layers whose estimated rounding noise falls if they are smoothed."""
    watched = {next(iter(readers)): next(iter(readers.values())) for readers, _ in wanted}
    seen = input_spreads(session, watched, session.teacher, "channel ranges")
    chosen = []
    for readers, factors in wanted:
        found = of_layer(seen, next(iter(readers)))
        layers = list(readers.values())
        if not layers[0].input_quantizers:  # nothing to smooth for
            continue
        arguments = found[f"{CHANNELS}.low"], found[f"{CHANNELS}.high"], found["square"]
        stands = layers[0].smoothing
        ones = torch.ones(len(factors)) if stands is None else stands.cpu()
        before = rounding_noise(layers, *arguments, ones, None)
        after = rounding_noise(layers, *arguments, ones * relative_factors(factors).cpu(), None)
        if after < (1 - LEAST_GAIN) * before:
            chosen.append((readers, factors))
    return chosen


def smoothing_factors(place: Modulation, output: Tensor) -> Tensor:
    """S of one place.

    Scale-shift: ``S_c = mean_t |1 + scale_{t,c}|``. Additive: ``S_c = |gamma_c| mean_t max(1, |n_{t,c}|)`` with n
    the embedding, standardised as the block's normalisation does it; 1 if the embedding says nothing.

    Args:
        place: where the embedding enters.
        output: [T, ...] of its projection.

    Returns:
        [C], positive.
    """
    embedding = place.embedding(output).float()
    if place.kind != ADDITIVE:
        return (1 + embedding).abs().mean(0).clamp(min=EPSILON)
    n = nn.functional.group_norm(embedding, place.groups, eps=place.eps)
    if float(n.abs().max()) < EPSILON:
        return torch.ones_like(n[0])
    gamma = torch.ones_like(n[0]) if place.gamma is None else place.gamma.detach().abs().to(n)
    return (gamma * n.abs().clamp(min=1).mean(0)).clamp(min=EPSILON)


def _projections(session: Session, paths: set[str]) -> dict[str, Tensor]:
    """Outputs of the layers that compute embeddings, in full precision.

    At every timestep of training; where more than the timestep enters, at those of the calibration rows.
    """
    time = session.structure.time
    known = paths & set(time.features)
    outputs: dict[str, Tensor] = {}
    if known:
        features = time.together(session.denoiser, session.all_timesteps().to(session.device))
        outputs = {path: features[path] for path in known}
    if rest := paths - known:
        say(f"{len(rest)} embeddings depend on more than the timestep: their factors come from the rows")
        outputs |= _row_outputs(session, rest)
    return outputs


def _row_outputs(session: Session, paths: set[str]) -> dict[str, Tensor]:
    """Outputs of some layers for the calibration rows, in full precision."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in sorted(paths)}
    layers = {path: session.denoiser.get_submodule(path) for path in outputs}

    def after(call: ModuleCall) -> None:
        outputs[call.name].append(call.output)

    observe_rows(session, layers, "embeddings", after=after, mode=session.teacher)
    return {path: torch.cat(parts) for path, parts in outputs.items()}


@dataclass(frozen=True)
class MeasureErrors(Stage):
    """Measure the mean error of the prediction at every calibrated timestep, for each of its channels.

    Attributes:
        guard: means within so many standard errors of 0 become 0: they are chance.
    """

    name = "measure-errors"
    description = "a table of the prediction's mean errors by timestep, for sample --correction table"
    needs = (WEIGHT_SCALES, ACTIVATION_SCALES)
    last = True

    guard: float = 2.0

    def run(self, session: Session) -> None:
        """Write the correction table of the checkpoint."""
        session.draft.tensors(
            f"{session.component}/{CORRECTION}", lambda: _measured(session, self.guard).to_tensors()
        )

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """See `Stage.cost`."""
        return 2, 0


def _measured(session: Session, guard: float) -> CorrectionTable:
    rows, batch = session.rows(), session.batch
    errors = []
    with torch.no_grad():
        for start in track(range(0, len(rows), batch), "mean errors"):
            inputs = session.inputs(rows[start : start + batch])
            quantized = denoise(session.denoiser, inputs)
            with session.teacher():
                errors.append(channel_means(quantized - denoise(session.denoiser, inputs)).cpu())
    timesteps = session.data.timesteps[rows].float().flatten()
    table = mean_errors(torch.cat(errors), timesteps, session.prediction_type, guard)
    share = float((table.means != 0).float().mean())
    say(f"mean errors: {share:.0%} are larger than chance, up to {float(table.means.abs().max()):.4f}")
    return table


def channel_means(x: Tensor) -> Tensor:
    """Means of each channel of each row: [B, C, H, W] or [B, tokens, C] to [B, C]."""
    return x.flatten(2).mean(2) if x.ndim != 3 else x.mean(1)


def mean_errors(errors: Tensor, timesteps: Tensor, prediction: str, guard: float) -> CorrectionTable:
    """The table of rows' errors.

    Args:
        errors: [B, C] mean errors of each row.
        timesteps: [B].
        prediction: the type of what the errors are of.
        guard: means within so many standard errors of 0 become 0.
    """
    distinct = timesteps.unique()
    means = []
    for timestep in distinct:
        own = errors[timesteps == timestep].double()
        mean, count = own.mean(0), len(own)
        spread = own.std(0) / count**0.5 if count > 1 else torch.full_like(mean, torch.inf)
        means.append(torch.where(mean.abs() > guard * spread, mean, 0))
    return CorrectionTable(distinct, torch.stack(means).float(), prediction)


METHOD = Method(
    "qncd",
    "QNCD, Chu et al., ACM MM 2024, arXiv 2403.19140",
    "smoothing by the timestep's embedding, AdaRound, a table that corrects the prediction's mean error",
    (
        SmoothEmbeddings(),
        WeightRanges("lp"),
        AdaRound(),
        ActivationRanges("lp"),
        MeasureErrors(),
    ),
)
