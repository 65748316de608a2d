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

from qdeploy.calibrate.attention import AttentionQuantizers
from qdeploy.calibrate.fakequant import QuantizedLayer
from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    chosen_dimension,
    cluster,
    of_layer,
    relative_spans,
    watch,
)
from qdeploy.calibrate.log_attention import LogQuantizer
from qdeploy.calibrate.methods import ACTIVATION_SCALES, WEIGHT_SCALES, Method, Stage
from qdeploy.calibrate.patches import PIXELS, ROWS
from qdeploy.calibrate.quantizers import ActivationQuantizer
from qdeploy.calibrate.rounding_noise import LEAST_GAIN, rounding_noise
from qdeploy.calibrate.session import Session
from qdeploy.errors import UsageError
from qdeploy.formats import Format, parse_format
from qdeploy.progress import say
from qdeploy.structure import Layer
from qdeploy.targets import find_target

FORMS = ("auto", "fold", "split")

Family = tuple[list[Layer], list[QuantizedLayer]]


@dataclass(frozen=True)
class Plan:
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


# -- channels ------------------------------------------------------------------------------------------------


def group_channels(
    session: Session, *, groups: int = 2, form: str = "auto", check: bool = True, choose: bool = False
) -> None:
    """Give the input channels of every layer scales by groups, in a form that engines run.

    Layers that quantize the halves of a concatenation on their own are left as they are.

    Args:
        session: the calibration.
        groups: G, how many groups at most; 1 changes nothing.
        form: ``fold``, ``split``, or ``auto``: fold for weights of eight bits, split for fewer.
        check: leave layers whose estimated noise would not fall.
        choose: leave layers whose tokens or pixels differ more than their channels, as the paper's code does.

    Raises:
        UsageError: an unknown form, an impossible number of groups, or no activations to group.
    """
    number_format = activation_format(session, "group-channels")
    form = _form(form, session)
    families = layer_families(session)
    whole = [
        (layers[0].path, modules[0]) for layers, modules in families if not reads_some_channels(modules[0])
    ]
    check_groups(groups, {path: module.weight.shape[1] for path, module in whole})
    firsts = {layers[0].path: modules[0] for layers, modules in families}
    measured = session.draft.step(
        f"{session.stage}-measured", lambda: watch(session, firsts, session.teacher(), "channel ranges")
    )
    plans = {
        layers[0].path: _plan(
            session, modules, of_layer(measured, layers[0].path), groups, form, check, choose
        )
        for layers, modules in families
    }

    def compute() -> None:
        for layers, modules in families:
            plan = plans[layers[0].path]
            if not plan.left:
                _fold(modules, plan) if form == "fold" else _split(modules, plan)

    session.once("groups", compute)
    report = _channel_report(families, plans, measured, number_format, form, groups)
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
) -> Plan:
    weights, activations = modules[0].formats
    low, high = found[f"{CHANNELS}.low"], found[f"{CHANNELS}.high"]
    nothing = torch.zeros_like(low, dtype=torch.int64)
    if reason := _unfit(modules[0], found, choose):
        return Plan(nothing, torch.ones_like(low), 1.0, reason)
    assert activations is not None
    labels = cluster(low, high, groups, session.generator("groups", session.stage, str(len(low))))
    spans = relative_spans(low, high, labels, activations.symmetric)
    if int(labels.max()) == 0:
        return Plan(labels, torch.ones_like(low), 1.0, "one group")
    factors = spans / spans.amin()
    before = rounding_noise(modules, low, high, found["square"], torch.ones_like(low), None)
    after = rounding_noise(modules, low, high, found["square"], factors, labels if form == "split" else None)
    ratio = after / before if before else 1.0
    left = "no less noise" if check and weights is not None and ratio > 1 - LEAST_GAIN else ""
    return Plan(labels, factors, ratio, left)


def _unfit(module: QuantizedLayer, found: Mapping[str, Tensor], choose: bool) -> str:
    """Why a layer cannot have groups of channels; empty if it can."""
    if module.split:
        return "quantizes the halves of a concatenation"
    if reads_some_channels(module):
        return "convolves groups of channels"
    if choose and (wins := reference_dimension(found)) in (TOKENS, PIXELS):
        return f"its {wins} differ more"
    return ""


def reads_some_channels(module: QuantizedLayer) -> bool:
    """Whether a layer is a convolution whose outputs read some of the input channels only."""
    return int(getattr(module.inner, "groups", 1)) > 1


def reference_dimension(found: Mapping[str, Tensor]) -> str | None:
    """The dimension that the paper's code would group along: of a convolution's it sees im2col's only."""
    if f"{ROWS}.difference" in found:
        return chosen_dimension(found, (ROWS, PIXELS))
    return chosen_dimension(found, (CHANNELS, TOKENS)) if f"{TOKENS}.difference" in found else None


def _fold(modules: list[QuantizedLayer], plan: Plan) -> None:
    for module in modules:
        module.smoothing = plan.factors.to(module.device)


def _split(modules: list[QuantizedLayer], plan: Plan) -> None:
    order = plan.labels.argsort(stable=True)
    for module in modules:
        module.cut(plan.sizes, order.to(module.device))
        module.input_quantizers = modules[0].input_quantizers


def _channel_report(
    families: list[Family],
    plans: Mapping[str, Plan],
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


# -- tokens --------------------------------------------------------------------------------------------------


def group_tokens(session: Session, *, groups: int = 8, channels: bool = False) -> None:
    """Give the tokens of linear layers scales by groups, where they differ more than the channels do.

    The scale of a token is that of the tensor times its group's share of the range. It stands outside of the
    layer's sum, so an engine runs it, for the number of tokens that was calibrated and no other: the
    resolution is locked. Layers whose channels have groups are left as they are.

    Args:
        session: the calibration.
        groups: G, how many groups at most; 1 changes nothing.
        channels: also give layers whose channels differ more a scale for each channel, weights as they are:
            the paper's own form, which no engine runs.

    Raises:
        UsageError: an impossible number of groups, no activations to group, or a format with a zero point
            that an engine would have to move.
    """
    number_format = activation_format(session, "group-tokens")
    if not number_format.symmetric and find_target(session.recipe.target).backends:
        raise UsageError(
            f"groups of tokens need a symmetric activation format, and {number_format.name} has a zero point: "
            "choose --activations int8, or --target simulated for research"
        )
    check_groups(groups, {})
    free = {
        layers[0].path: modules[0]
        for layers, modules in layer_families(session)
        if not modules[0].split
        and modules[0].smoothing is None
        and modules[0].activation_quantizers[0].axis is None
    }
    measured = session.draft.step(
        f"{session.stage}-measured", lambda: watch(session, free, session.weights_only(), "token ranges")
    )
    chosen = {path: reference_dimension(of_layer(measured, path)) for path in free}

    def compute() -> None:
        for path, layer in free.items():
            dimension = _axis_of(layer, chosen[path], channels)
            if dimension:
                _scale_along(session, layer, of_layer(measured, path), *dimension, groups)

    session.once("groups", compute)
    given = [path for path, layer in free.items() if _axis_of(layer, chosen[path], channels)]
    session.report["token_groups"] = {"layers": sum(chosen[path] == TOKENS for path in given), "along": given}
    say(f"groups of tokens: {len(given)} of {len(free)} tensors that layers read")


def _axis_of(layer: QuantizedLayer, dimension: str | None, channels: bool) -> tuple[str, int] | None:
    """Name and axis of the dimension to group along, if there is one."""
    if dimension == TOKENS:
        return TOKENS, -2
    wins = channels and dimension in (CHANNELS, ROWS) and not reads_some_channels(layer)
    return (CHANNELS, layer.feature_axis) if wins else None


def _scale_along(
    session: Session,
    layer: QuantizedLayer,
    found: Mapping[str, Tensor],
    dimension: str,
    axis: int,
    groups: int,
) -> None:
    (quantizer,) = layer.activation_quantizers
    labels = labels_along(session, found, dimension, groups)
    give_shares(quantizer, found, dimension, labels, axis)


def labels_along(session: Session, found: Mapping[str, Tensor], dimension: str, groups: int) -> Tensor:
    """[A] the group of each index of a dimension whose extremes `watch` found; at most so many groups."""
    low, high = found[f"{dimension}.low"], found[f"{dimension}.high"]
    return cluster(low, high, groups, session.generator("groups", session.stage, str(len(low))))


def give_shares(
    quantizer: ActivationQuantizer, found: Mapping[str, Tensor], dimension: str, labels: Tensor, axis: int
) -> None:
    """Turn the scale of a tensor into scales along a dimension, each as large as its group's share of the range.

    Args:
        quantizer: has one scale, or one for each group of timesteps.
        found: extremes along the dimension, as of `watch`.
        dimension: a name of them.
        labels: [A] the group of each index.
        axis: of what the quantizer is given.
    """
    low, high = found[f"{dimension}.low"], found[f"{dimension}.high"]
    shares = relative_spans(low, high, labels, quantizer.format.symmetric).to(quantizer.scale.device)
    scale = quantizer.scale[..., None] * shares
    zero_point = quantizer.zero_point[..., None].expand_as(scale)
    quantizer.set(scale, zero_point, quantizer.edges if quantizer.banked else None, axis)


# -- attention -----------------------------------------------------------------------------------------------


def log_attention(session: Session, *, start_token: bool = True) -> None:
    """Quantize softmax outputs on a logarithmic scale, as wide as activations.

    Args:
        session: the calibration.
        start_token: in cross-attention, leave the first key and its probabilities as they are.

    Raises:
        UsageError: the coverage quantizes no attention.
    """
    number_format = activation_format(session, "log-attention")
    found = {
        path: module
        for path in session.structure.attentions
        for module in session.denoiser.get_submodule(path).children()
        if isinstance(module, AttentionQuantizers)
    }
    if session.structure.attentions and not found:
        raise UsageError(
            f"the coverage {session.recipe.coverage} quantizes no attention products: choose --coverage dgq-paper"
        )

    def compute() -> None:
        for path, quantizers in found.items():
            start = start_token and crosses(session.structure.layers, path)
            quantizers.probabilities = LogQuantizer(number_format.bits, start)

    session.once("attention", compute)


def crosses(layers: tuple[Layer, ...], attention: str) -> bool:
    """Whether keys come from another tensor than queries: its layers then read three tensors and not two."""
    return len({layer.reads for layer in layers if layer.path.startswith(f"{attention}.")}) > 2


# -- what all of them ask ------------------------------------------------------------------------------------


def layer_families(session: Session) -> list[Family]:
    """The layers with quantized inputs, those that share a quantizer together, in execution order."""
    modules = session.quantized(session.layers)
    families: dict[int, Family] = {}
    for layer, module in zip(session.layers, modules, strict=True):
        if module.input_quantizers:
            family = families.setdefault(id(module.input_quantizers), ([], []))
            family[0].append(layer)
            family[1].append(module)
    return list(families.values())


def activation_format(session: Session, stage: str) -> Format:
    """The format that a stage makes groups for.

    Raises:
        UsageError: there is none.
    """
    number_format = parse_format(session.recipe.activations)
    if number_format is None:
        raise UsageError(f"stage {stage!r} works on activations, and activations are 'none'")
    return number_format


def _form(form: str, session: Session) -> str:
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r} of group-channels: choose from {', '.join(FORMS)}")
    weights = parse_format(session.recipe.weights)
    return ("fold" if weights and weights.bits >= 8 else "split") if form == "auto" else form


def check_groups(groups: Any, channels: Mapping[str, int]) -> None:
    """Refuse an impossible number of groups.

    Args:
        groups: what was asked for.
        channels: how many there are to put into groups, by layer.

    Raises:
        UsageError: it is no positive number, or a layer has fewer channels.
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise UsageError(f"groups must be a positive number, not {groups!r}")
    narrow = next(((path, count) for path, count in channels.items() if count < groups), None)
    if narrow:
        raise UsageError(
            f"{groups} groups are more than the {narrow[1]} input channels of {narrow[0]}: choose fewer groups, "
            "or --exclude the layer"
        )


def _needs_wide_sums(options: Mapping[str, Any]) -> str:
    return "a scale for each input channel has no place in an integer kernel" if options["channels"] else ""


STAGES = (
    Stage(
        "group-channels",
        group_channels,
        "scales for groups of input channels, folded into weights or as convolutions of their own",
        lambda options, units, effort: (1, 0),
        paper="DGQ, arXiv 2501.04304",
        spoils=(WEIGHT_SCALES, ACTIVATION_SCALES),
    ),
    Stage(
        "group-tokens",
        group_tokens,
        "scales for groups of tokens; locks the resolution",
        lambda options, units, effort: (1, 0),
        paper="DGQ, arXiv 2501.04304",
        needs=(ACTIVATION_SCALES,),
        gives=(ACTIVATION_SCALES,),
        simulated=_needs_wide_sums,
    ),
    Stage(
        "log-attention",
        log_attention,
        "softmax outputs as powers of two below the sample's largest, the start token as it is",
        lambda options, units, effort: (0, 0),
        paper="DGQ, arXiv 2501.04304",
        spoils=(ACTIVATION_SCALES,),
        simulated=lambda options: "no engine multiplies logarithmic codes",
    ),
)

METHOD = Method(
    "dgq",
    "DGQ, Ryu et al., ICLR 2025, arXiv 2501.04304",
    "groups of channels with scales of their own, where that lowers the noise; AdaRound",
    (
        ("group-channels", {}),
        ("weight-ranges", {"finder": "lp"}),
        ("round-weights", {}),
        ("activation-ranges", {"finder": "minmax"}),
    ),
)
