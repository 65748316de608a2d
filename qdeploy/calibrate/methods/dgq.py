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
    Family,
    activation_format,
    check_groups,
    layer_families,
    reads_some_channels,
    reference_dimension,
)
from qdeploy.calibrate.methods.minmax import ActivationRanges, WeightRanges
from qdeploy.calibrate.methods.qdiffusion import AdaRound
from qdeploy.calibrate.rounding_noise import LEAST_GAIN, rounding_noise
from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import PIXELS, ROWS
from qdeploy.recipe.formats import Format, parse_format
from qdeploy.recipe.stages import ACTIVATION_SCALES, WEIGHT_SCALES, Method, Stage
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say

FORMS = ("auto", "fold", "split")


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of the layers that read one tensor.

    Attributes:
        labels: [C] the group of each input channel; groups are numbered from the narrowest.
        factors: [C] relative scales, 1 and more.
        noise: estimated rounding noise with groups, relative to that without.
        left: why they are left as they are; empty if they are grouped.
    """

    labels: Tensor
    factors: Tensor
    noise: float
    left: str = ""

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
            raise UsageError(f"unknown form {self.form!r} of group-channels: choose from {', '.join(FORMS)}")

    def run(self, session: Session) -> None:
        """Fold or split the weights of layers, and write the report of groups."""
        number_format = activation_format(session, "group-channels")
        form = _form(self.form, session)
        families = layer_families(session)
        whole = [
            (layers[0].path, modules[0])
            for layers, modules in families
            if not reads_some_channels(modules[0])
        ]
        check_groups(self.groups, {path: module.weight.shape[1] for path, module in whole})
        firsts = {layers[0].path: modules[0] for layers, modules in families}
        measured = session.draft.step(
            f"{session.stage}-measured",
            lambda: input_spreads(session, firsts, session.teacher, "channel ranges"),
        )
        plans = {
            layers[0].path: _plan(
                session,
                modules,
                of_layer(measured, layers[0].path),
                self.groups,
                form,
                self.check,
                self.choose,
            )
            for layers, modules in families
        }

        def compute() -> None:
            for layers, modules in families:
                plan = plans[layers[0].path]
                if not plan.left:
                    _fold(modules, plan) if form == "fold" else _split(modules, plan)

        session.once("groups", compute)
        report = _channel_report(families, plans, measured, number_format, form, self.groups)
        session.draft.json(f"{session.component}/groups.json", report)
        session.report["groups"] = report["counts"]
        say(f"groups of channels: {report['counts']['grouped']} of {len(session.layers)} layers, form {form}")


def _plan(
    session: Session,
    modules: list[QuantizedLayer],
    found: Mapping[str, Tensor],
    groups: int,
    form: str,
    check: bool,
    choose: bool,
) -> GroupPlan:
    weights, activations = modules[0].formats
    low, high = found[f"{CHANNELS}.low"], found[f"{CHANNELS}.high"]
    nothing = torch.zeros_like(low, dtype=torch.int64)
    if reason := _unfit(modules[0], found, choose):
        return GroupPlan(nothing, torch.ones_like(low), 1.0, reason)
    assert activations is not None
    labels = cluster(low, high, groups, session.generator("groups", session.stage, str(len(low))))
    spans = relative_spans(low, high, labels, activations.symmetric)
    if int(labels.max()) == 0:
        return GroupPlan(labels, torch.ones_like(low), 1.0, "one group")
    factors = spans / spans.amin()
    before = rounding_noise(modules, low, high, found["square"], torch.ones_like(low), None)
    after = rounding_noise(modules, low, high, found["square"], factors, labels if form == "split" else None)
    ratio = after / before if before else 1.0
    left = "no less noise" if check and weights is not None and ratio > 1 - LEAST_GAIN else ""
    return GroupPlan(labels, factors, ratio, left)


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
    families: list[Family],
    plans: Mapping[str, GroupPlan],
    measured: Mapping[str, Tensor],
    number_format: Format,
    form: str,
    groups: int,
) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    counts: dict[str, Any] = {"grouped": 0, "left": {}, "paper_dimension": {}, "im2col_fallback": 0}
    for family, modules in families:
        plan, found = plans[family[0].path], of_layer(measured, family[0].path)
        dimension = reference_dimension(found) or "none"
        for layer, module in zip(family, modules, strict=True):
            layers[layer.path] = {
                "sizes": [] if plan.left else list(plan.sizes),
                "largest_factor": 1.0 if plan.left else round(float(plan.factors.max()), 4),
                "estimated_noise": round(plan.noise, 4),
                "left": plan.left,
                "paper_dimension": dimension,
            }
            counts["grouped"] += not plan.left
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
