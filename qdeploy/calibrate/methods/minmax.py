"""Min-max calibration: the baseline, and the range-finding stage that every method begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qdeploy.calibrate.observe_rows import observe_rows
from qdeploy.calibrate.session import Session
from qdeploy.calibrate.timestep_groups import find_edges
from qdeploy.network.observe import ModuleCall
from qdeploy.quant.activation_finders import ACTIVATION_FINDERS, CHANNEL_FINDERS, channel_ranges
from qdeploy.quant.activation_statistics import ActivationStatistics
from qdeploy.quant.layer import QuantizedLayer, quantized_layers
from qdeploy.quant.one_zero_point import with_one_zero_point
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import WEIGHT_FINDERS, check_finder
from qdeploy.quant.shared_inputs import by_quantizer
from qdeploy.quant.state import quantizers
from qdeploy.quant.time_ranges import ranges_by_timestep
from qdeploy.recipe.effort import Effort
from qdeploy.recipe.formats import Format
from qdeploy.recipe.stages import ACTIVATION_SCALES, WEIGHT_SCALES, Method, Stage
from qdeploy.recipe.targets import find_target
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

    Where the recipe wants groups of timesteps, each group gets a scale of its own; the zero point, where the format
    has one, is the same for all groups on targets with engines. The range of every
    quantized tensor at every timestep is kept with the checkpoint.

    Attributes:
        finder: ``minmax``, ``percentile``, ``running``, ``lp``, ``mse`` or ``entropy``.
        channelwise: give each channel of a layer's input a scale of its own, by ``minmax``, ``lp`` or ``mse``: a
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
        check_finder(self.finder, CHANNEL_FINDERS if self.channelwise else ACTIVATION_FINDERS)

    def run(self, session: Session) -> None:
        """Set the scale of every activation quantizer, and keep the ranges with the checkpoint."""

        hoisted = bool(find_target(session.recipe.target).backends)

        def compute() -> None:
            seen = summarize(session, self.channelwise)
            ranges = ranges_by_timestep({name: statistics for name, _, statistics in seen})
            session.keep_ranges(ranges)
            edges = find_edges(session.recipe.timestep_groups, ranges)
            for _, quantizer, statistics in track(seen, "activation scales"):
                groups = statistics.groups(edges)
                if len(groups) > 1 and hoisted and not quantizer.format.symmetric:
                    quantizer.set(*with_one_zero_point(groups, self.finder, quantizer.format), edges)
                    continue
                found = [_find(part, self.finder, quantizer.format) for part in groups]
                scales, zeros = zip(*found, strict=True)
                quantizer.set(torch.stack(scales), torch.stack(zeros), edges, statistics.axis)

        session.once("activations", compute)

    def simulated(self) -> str:
        """Why no engine can run the result."""
        return "no engine has a scale for each input channel" if self.channelwise else ""


def _find(
    statistics: ActivationStatistics, finder: str, number_format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    if statistics.axis is not None:
        return channel_ranges(statistics, finder, number_format)
    return ACTIVATION_FINDERS[finder](statistics, number_format)


def summarize(
    session: Session, channelwise: bool = False
) -> list[tuple[str, ActivationQuantizer, ActivationStatistics]]:
    """Statistics of what every activation quantizer sees, weights quantized and activations float.

    A tensor that several layers read is looked at once, at the first of them. With ``channelwise``, the inputs of
    layers keep their channels apart; operands of attention do not.

    Returns:
        Name, quantizer and statistics, in the order of execution.
    """
    by_timestep = session.recipe.timestep_groups != 1
    found = {
        id(quantizer): (name, quantizer, ActivationStatistics(by_timestep=by_timestep))
        for name, quantizer in quantizers(session.denoiser)
        if isinstance(quantizer, ActivationQuantizer)
    }
    readers = [next(iter(group.items())) for group in by_quantizer(quantized_layers(session.denoiser))]
    inputs = {id(quantizer) for _, layer in readers for quantizer in layer.activation_quantizers}
    observed: dict[str, nn.Module] = dict(readers)
    observed |= {name: quantizer for name, quantizer, _ in found.values() if id(quantizer) not in inputs}
    met: dict[str, None] = {}

    def observe(quantizer: ActivationQuantizer, x: torch.Tensor) -> None:
        name, _, statistics = found[id(quantizer)]
        met.setdefault(name)
        statistics.observe(x, quantizer.current_timestep.now if quantizer.current_timestep else None)

    def before(call: ModuleCall) -> None:
        if isinstance(call.module, ActivationQuantizer):
            observe(call.module, call.input)
        elif isinstance(call.module, QuantizedLayer):
            for quantizer, part in zip(
                call.module.activation_quantizers, call.module.input_parts(call.input), strict=True
            ):
                if channelwise:
                    found[id(quantizer)][2].axis = call.module.feature_axis
                observe(quantizer, part)

    observe_rows(session, observed, "activation ranges", before=before, mode=session.weights_only)
    places = {name: place for place, name in enumerate(met)}
    return sorted(found.values(), key=lambda entry: places.get(entry[0], len(places)))


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
