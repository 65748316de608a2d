"""DGQ (Ryu et al., ICLR 2025, arXiv 2501.04304): groups that keep outliers, and attention on a log scale.

Outlier-preserving group quantization gives the channels (or tokens) of an activation, clustered by their
ranges, a scale for each group. A scale of a channel stands inside of a layer's sum, where no engine has a
place for it; what an engine can run is one of two rewrites. ``fold`` divides the input by the group's scale,
relative to the smallest, and multiplies the weight: exact for activations, at the price of wider weights, good
with eight bits. ``split`` gives each group a convolution of its own, and adds. A scale of a token stands
outside of the sum and is multiplied back behind it. Departures from the paper and its released code, each for
a reason:

- groups of a convolution are of input channels; the code groups rows and columns of the im2col matrix, which
  no convolution kernel forms (how often it would is counted in the report; `group-patches` simulates it);
- dimension, groups and ratios of scales come from all timesteps together and stay; the code decides anew at
  every timestep. One factor for each group of timesteps varies (``timestep_groups``), by the timestep's value;
- ranges are those of the float network, and include zero; no group is empty;
- a layer is grouped where that lowers the estimated rounding noise of weights and activations together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    cluster,
    input_spreads,
    of_layer,
    relative_spans,
)
from qdeploy.calibrate.input_groups import (
    activation_format,
    check_group_count,
    group_ends,
    in_words,
    quantized_inputs,
    reads_some_channels,
    reference_dimension,
)
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.rounding_noise import LEAST_GAIN, rounding_noise
from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import PIXELS, ROWS
from qdeploy.quant.shared_inputs import Readers
from qdeploy.recipe.formats import Format, parse_format
from qdeploy.recipe.stages import ACTIVATION_SCALES, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say
from qdeploy.system.suggest import unknown

FORMS = ("auto", "fold", "split")
HELD = 0.8  # of a step: if the paper's are narrower than this, a deployable form is said to lack zero points


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of the layers that read one tensor.

    Attributes:
        labels: [C] the group of each input channel; groups are numbered from the narrowest.
        factors: [C] relative scales, 1 and more.
        noise: estimated rounding noise with groups, relative to that without.
        left: why they are left as they are; empty if they are grouped.
        paper_steps: how wide steps would be with a zero point for each group, as in the paper, as a share of
            those with one zero point for all groups.
    """

    labels: Tensor
    factors: Tensor
    noise: float
    left: str = ""
    paper_steps: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels of each group."""
        return tuple(torch.bincount(self.labels).tolist())


@dataclass(frozen=True)
class GroupChannels(Stage):
    """Give the input channels of every layer scales by groups, in a form that engines run.

    Layers that quantize the halves of a concatenation on their own are left as they are. Running it raises
    `UsageError` for an impossible number of groups, or where there are no activations to group.

    Attributes:
        groups: G, how many groups at most; 1 changes nothing.
        form: ``fold``, ``split``, or ``auto``: fold for weights of eight bits, split for fewer.
        check: leave layers whose estimated noise would not fall.
        choose: leave layers whose tokens or pixels differ more than their channels, as the paper's code does.
    """

    name = "group-channels"
    description = "scales for groups of input channels, folded into weights or as convolutions of their own"
    paper = "DGQ, arXiv 2501.04304"
    spoils = (WEIGHT_SCALES, ACTIVATION_SCALES)

    groups: int = 2
    form: str = "auto"
    check: bool = True
    choose: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: an unknown form.
        """
        super().__post_init__()
        if self.form not in FORMS:
            raise UsageError(unknown("form of group-channels", self.form, FORMS))

    def run(self, session: Session) -> None:
        """Fold or split the weights of layers, and write the report of groups."""
        number_format = activation_format(session, "group-channels")
        form = _form(self.form, session)
        inputs = quantized_inputs(session)
        firsts = dict(next(iter(readers.items())) for readers in inputs)
        whole = {path: layer for path, layer in firsts.items() if not reads_some_channels(layer)}
        check_group_count(self.groups, {path: layer.weight.shape[1] for path, layer in whole.items()})
        measured = session.draft.step(
            f"{session.stage}-measured",
            lambda: input_spreads(session, firsts, session.teacher, "channel ranges"),
        )
        plans = [
            self._plan(session, list(readers.values()), of_layer(measured, first), form)
            for first, readers in zip(firsts, inputs, strict=True)
        ]

        def compute() -> None:
            for readers, plan in zip(inputs, plans, strict=True):
                if not plan.left:
                    modules = list(readers.values())
                    _fold(modules, plan) if form == "fold" else _split(modules, plan)

        session.once("groups", compute)
        report = _channel_report(inputs, plans, measured, number_format, form, self.groups)
        session.draft.json(f"{session.component}/groups.json", report)
        counts = session.report["groups"] = report["counts"]
        say(
            f"groups of channels: {counts['grouped']} of {len(session.layers)} layers, form {form}"
            + in_words(counts["left"])
        )
        if counts["without_zero_points"]:
            say(
                f"{counts['without_zero_points']} of them have one zero point for all groups, where the paper's zero "
                f"points by group would give steps less than {HELD:.0%} as wide: no engine has a place for them"
            )

    def _plan(
        self, session: Session, modules: list[QuantizedLayer], found: Mapping[str, Tensor], form: str
    ) -> GroupPlan:
        weights, activations = modules[0].formats
        low, high = found[f"{CHANNELS}.low"], found[f"{CHANNELS}.high"]
        ones = torch.ones_like(low)
        if reason := _unfit(modules[0], found, self.choose):
            return GroupPlan(torch.zeros_like(low, dtype=torch.int64), ones, 1.0, reason)
        assert activations is not None
        labels = cluster(low, high, self.groups, session.generator("groups", session.stage, str(len(low))))
        if int(labels.max()) == 0:
            return GroupPlan(labels, ones, 1.0, "one group")
        before = rounding_noise(modules, low, high, found["square"], ones, None)
        apart = labels if form == "split" else None
        trials = []
        # with one zero point for all groups, either both ends are followed, or the larger one of each group
        for symmetric in dict.fromkeys((activations.symmetric, True)):
            spans = relative_spans(low, high, labels, symmetric)
            factors = spans / spans.amin()
            after = rounding_noise(modules, low, high, found["square"], factors, apart)
            trials.append((after / before if before else 1.0, factors))
        ratio, factors = min(trials, key=lambda trial: trial[0])
        left = "no less noise" if self.check and weights is not None and ratio > 1 - LEAST_GAIN else ""
        held = form == "split" or activations.symmetric
        steps = 1.0 if held else _steps_by_zero_point(low, high, labels, factors)
        return GroupPlan(labels, factors, ratio, left, steps)


def _steps_by_zero_point(low: Tensor, high: Tensor, labels: Tensor, factors: Tensor) -> float:
    """How wide steps would be with a zero point for each group, as a share of those with one for all groups.

    The mean over channels, of a folded layer.
    """
    steps = factors * ((high / factors).amax().clamp(min=0) - (low / factors).amin().clamp(max=0))
    lows, highs = group_ends(low, high, labels)
    return float(((highs - lows) / steps.clamp(min=torch.finfo(steps.dtype).tiny)).clamp(max=1).mean())


def _unfit(module: QuantizedLayer, found: Mapping[str, Tensor], choose: bool) -> str:
    """Why a layer cannot have groups of channels; empty if it can."""
    if module.split:
        return "quantizes the halves of a concatenation"
    if reads_some_channels(module):
        return "convolves groups of channels"
    if choose and (wins := reference_dimension(found)) in (TOKENS, PIXELS):
        return f"its {wins} differ more"
    return ""


def _fold(modules: list[QuantizedLayer], plan: GroupPlan) -> None:
    for module in modules:
        module.smoothing = plan.factors.to(module.device)


def _split(modules: list[QuantizedLayer], plan: GroupPlan) -> None:
    order = plan.labels.argsort(stable=True)
    for module in modules:
        module.cut(plan.sizes, order.to(module.device))
        module.input_quantizers = modules[0].input_quantizers


def _channel_report(
    inputs: list[Readers],
    plans: list[GroupPlan],
    measured: Mapping[str, Tensor],
    number_format: Format,
    form: str,
    groups: int,
) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    counts: dict[str, Any] = {
        "grouped": 0,
        "left": {},
        "without_zero_points": 0,
        "paper_dimension": {},
        "im2col_fallback": 0,
    }
    for readers, plan in zip(inputs, plans, strict=True):
        dimension = reference_dimension(of_layer(measured, next(iter(readers)))) or "none"
        for path, module in readers.items():
            layers[path] = {
                "sizes": [] if plan.left else list(plan.sizes),
                "largest_factor": 1.0 if plan.left else round(float(plan.factors.max()), 4),
                "estimated_noise": round(plan.noise, 4),
                "left": plan.left,
                "paper_steps": round(plan.paper_steps, 4),
                "paper_dimension": dimension,
            }
            counts["grouped"] += not plan.left
            counts["without_zero_points"] += not plan.left and plan.paper_steps < HELD
            if plan.left:
                counts["left"][plan.left] = counts["left"].get(plan.left, 0) + 1
            counts["paper_dimension"][dimension] = counts["paper_dimension"].get(dimension, 0) + 1
            wide = isinstance(module.inner, nn.Conv2d) and module.inner.kernel_size != (1, 1)
            counts["im2col_fallback"] += wide and dimension in (ROWS, PIXELS)
    return {
        "form": form,
        "groups": groups,
        "activations": number_format.name,
        "counts": counts,
        "layers": layers,
    }


def _form(form: str, session: Session) -> str:
    weights = parse_format(session.recipe.weights)
    return ("fold" if weights and weights.bits >= 8 else "split") if form == "auto" else form


METHOD = Method(
    "dgq",
    "DGQ, Ryu et al., ICLR 2025, arXiv 2501.04304",
    "groups of channels with scales of their own, where that lowers the noise; AdaRound",
    (
        GroupChannels(),
        WeightRanges("lp"),
        AdaRound(),
        ActivationRanges("minmax"),
    ),
)
