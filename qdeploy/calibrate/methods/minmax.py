"""Min-max calibration: the baseline, and the range-finding stage that every method begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.timestep_groups import find_edges
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.channel_ranges import ChannelSummary
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import ACTIVATION_FINDERS, WEIGHT_FINDERS, Summary, check_finder
from qdeploy.quant.state import quantizers
from qdeploy.quant.time_ranges import ranges_by_timestep
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.formats import Format
from qdeploy.recipe.stages import ACTIVATION_SCALES, WEIGHT_SCALES, Method, Stage
from qdeploy.system.progress import track


@dataclass(frozen=True)
class WeightRanges(Stage):
    """Find the scale of every output channel of every weight.

    Attributes:
        finder: ``minmax``, or ``lp`` for least error.
    """

    name = "weight-ranges"
    description = "scales of weights, per output channel"
    gives = (WEIGHT_SCALES,)
    rows = False

    finder: str = "minmax"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an unknown finder.
        """
        super().__post_init__()
        check_finder(self.finder, WEIGHT_FINDERS)

    def run(self, session: Session) -> None:
        """Set the scale of every weight quantizer."""

        def compute() -> None:
            for layer in track(list(quantized_layers(session.denoiser).values()), "weight ranges"):
                for quantizer, weight in layer.weight_pairs():
                    quantizer.set(*WEIGHT_FINDERS[self.finder](weight, quantizer.format))

        session.once("weights", compute)

    def cost(self, units: int, effort: Effort) -> tuple[float, float]:
        """A search takes about half a pass over the rows; extremes take seconds."""
        return 0 if self.finder == "minmax" else 0.5, 0


@dataclass(frozen=True)
class ActivationRanges(Stage):
    """Find the scale of every quantized activation, in one pass over the calibration rows.

    Where the recipe wants groups of timesteps, each group gets a scale of its own. The range of every
    quantized tensor at every timestep is kept with the checkpoint.

    Attributes:
        finder: ``minmax``, ``percentile``, ``running`` or ``lp``.
        channelwise: give each channel of a layer's input a scale of its own, by ``minmax`` or ``lp``: a
            simulation.
    """

    name = "activation-ranges"
    description = "scales of layer inputs, per tensor"
    needs = (WEIGHT_SCALES,)
    gives = (ACTIVATION_SCALES,)

    finder: str = "minmax"
    channelwise: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an unknown finder, or one that finds no scales by channel.
        """
        super().__post_init__()
        check_finder(self.finder, WEIGHT_FINDERS if self.channelwise else ACTIVATION_FINDERS)

    def run(self, session: Session) -> None:
        """Set the scale of every activation quantizer, and keep the ranges with the checkpoint."""

        def compute() -> None:
            seen = summarize(session, self.channelwise)
            ranges = ranges_by_timestep({name: summary for name, _, summary in seen})
            session.keep_ranges(ranges)
            edges = find_edges(session.recipe.timestep_groups, ranges)
            for _, quantizer, summary in seen:
                axis = summary.axis if isinstance(summary, ChannelSummary) else None
                found = [_find(part, self.finder, quantizer.format) for part in summary.groups(edges)]
                scales, zeros = zip(*found, strict=True)
                quantizer.set(torch.stack(scales), torch.stack(zeros), edges, axis)

        session.once("activations", compute)

    def simulated(self) -> str:
        """Why no engine can run the result."""
        return "no engine has a scale for each input channel" if self.channelwise else ""


def _find(summary: Summary, finder: str, number_format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(summary, ChannelSummary):
        return summary.find(finder, number_format)
    return ACTIVATION_FINDERS[finder](summary, number_format)


def summarize(session: Session, channelwise: bool = False) -> list[tuple[str, ActivationQuantizer, Summary]]:
    """Summaries of what every activation quantizer sees, weights quantized and activations float.

    With ``channelwise``, those of layers' inputs keep their channels apart; operands of attention do not.

    Returns:
        Name, quantizer and summary, in the order of execution.
    """
    per_row = max(32, 2**18 // max(1, len(session.rows())))
    axes = {
        id(quantizer): layer.feature_axis
        for layer in quantized_layers(session.denoiser).values()
        for quantizer in layer.activation_quantizers
        if channelwise
    }
    found = [
        (
            name,
            quantizer,
            ChannelSummary(per_row, axis=axes[id(quantizer)]) if id(quantizer) in axes else Summary(per_row),
        )
        for name, quantizer in quantizers(session.denoiser)
        if isinstance(quantizer, ActivationQuantizer)
    ]
    summaries = {name: summary for name, _, summary in found}
    met: dict[str, None] = {}

    def before(call: ModuleCall) -> None:
        assert isinstance(call.module, ActivationQuantizer)
        met.setdefault(call.name)
        clock = call.module.clock
        summaries[call.name].observe(call.input, clock.now if clock else None)

    modules = {name: quantizer for name, quantizer, _ in found}
    observe_rows(session, modules, "activation ranges", before=before, mode=session.weights_only)
    places = {name: place for place, name in enumerate(met)}
    return sorted(found, key=lambda entry: places.get(entry[0], len(places)))


def round_to_nearest(layer: QuantizedLayer) -> None:
    """Decide every code that nothing else has decided."""
    for quantizer, weight in layer.weight_pairs():
        if quantizer.codes is None:
            quantizer.codes = quantizer.nearest(weight)


METHOD = Method(
    "minmax",
    "Krishnamoorthi 2018, arXiv 1806.08342",
    "min-max ranges and rounding to nearest: the baseline",
    (WeightRanges("minmax"), ActivationRanges("minmax")),
)
