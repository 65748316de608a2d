"""The layers that read one tensor, and scales for groups within it: what DGQ's stages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    chosen_dimension,
    cluster,
    relative_spans,
)
from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import PIXELS, ROWS
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.quant.ranges import to_scale
from qdeploy.quant.shared_inputs import Readers, by_quantizer
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import UsageError

_TINY = torch.finfo(torch.float32).tiny


def quantized_inputs(session: Session) -> list[Readers]:
    """The covered layers with quantized inputs, those that share a quantizer together, in execution order."""
    modules = session.quantized(session.layers)
    return by_quantizer({layer.path: module for layer, module in zip(session.layers, modules, strict=True)})


def activation_format(session: Session, stage: str) -> Format:
    """The format that a stage makes groups for.

    Raises:
        UsageError: there is none.
    """
    number_format = session.recipe.calibrated
    if number_format is None:
        raise UsageError(
            f"stage {stage!r} works on calibrated activations, and activations are {session.recipe.activations!r}"
        )
    return number_format


def check_group_count(groups: Any, channels: Mapping[str, int]) -> None:
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


def reads_some_channels(module: QuantizedLayer) -> bool:
    """Whether a layer is a convolution whose outputs read some of the input channels only."""
    return int(getattr(module.inner, "groups", 1)) > 1


def reference_dimension(found: Mapping[str, Tensor]) -> str | None:
    """The dimension that the paper's code would group along: of a convolution's it sees im2col's only."""
    if f"{ROWS}.difference" in found:
        return chosen_dimension(found, (ROWS, PIXELS))
    return chosen_dimension(found, (CHANNELS, TOKENS)) if f"{TOKENS}.difference" in found else None


def labels_along(session: Session, found: Mapping[str, Tensor], dimension: str, groups: int) -> Tensor:
    """[A] the group of each index of a dimension whose extremes `input_spreads` found; at most so many groups."""
    low, high = found[f"{dimension}.low"], found[f"{dimension}.high"]
    return cluster(low, high, groups, session.generator("groups", session.stage, str(len(low))))


def set_group_scales(
    quantizer: ActivationQuantizer, found: Mapping[str, Tensor], dimension: str, labels: Tensor, axis: int
) -> None:
    """Turn the range of a tensor into ranges along a dimension: each group's share of it.

    Where the format has a zero point, each group has its own, as in DGQ (``z_g = round(-low_g / s_g)``): behind an
    activation function that reaches equally far down in all channels, a scale alone could not follow the groups.
    A range that was found narrower than the extremes, or for a group of timesteps, narrows all groups alike.

    Args:
        quantizer: has one range, or one for each group of timesteps.
        found: extremes along the dimension (see `input_spreads`).
        dimension: a name of them.
        labels: [A] the group of each index.
        axis: of what the quantizer is given.
    """
    low, high = found[f"{dimension}.low"], found[f"{dimension}.high"]
    number_format, edges = quantizer.format, quantizer.edges if quantizer.banked else None
    if number_format.symmetric:
        shares = relative_spans(low, high, labels, symmetric=True).to(quantizer.scale.device)
        scale = quantizer.scale[..., None] * shares
        quantizer.set(scale, quantizer.zero_point[..., None].expand_as(scale), edges, axis)
        return
    lows, highs = (ends.to(quantizer.scale.device) for ends in group_ends(low, high, labels))
    span = (highs.amax() - lows.amin()).clamp(min=_TINY)
    share = (quantizer.scale * (number_format.qmax - number_format.qmin) / span)[..., None]
    scale, zero_point = to_scale(lows * share, highs * share, number_format)
    quantizer.set(scale, zero_point, edges, axis)


def group_ends(low: Tensor, high: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[A] the ends of the range of each index's group, zero included."""
    groups = torch.zeros(int(labels.max()) + 1, dtype=low.dtype)
    lows = groups.scatter_reduce(0, labels, low, "amin")
    highs = groups.scatter_reduce(0, labels, high, "amax")
    return lows[labels], highs[labels]


def in_words(left: Mapping[str, int]) -> str:
    """How many layers are left as they are, by reason; empty if none is."""
    reasons = ", ".join(f"{count} ({reason})" for reason, count in left.items())
    return f"; left as they are: {reasons}" if reasons else ""
