"""The layers that read one tensor, and scales for groups within it: what DGQ's stages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    chosen_dimension,
    cluster,
    relative_spans,
)
from qdeploy.calibrate.session import Session
from qdeploy.network.roles import Layer
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import PIXELS, ROWS
from qdeploy.quant.quantizers import ActivationQuantizer
from qdeploy.recipe.formats import Format
from qdeploy.system.errors import UsageError

Family = tuple[list[Layer], list[QuantizedLayer]]


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
    number_format = session.recipe.calibrated
    if number_format is None:
        raise UsageError(
            f"stage {stage!r} works on calibrated activations, and activations are {session.recipe.activations!r}"
        )
    return number_format


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


def give_shares(
    quantizer: ActivationQuantizer, found: Mapping[str, Tensor], dimension: str, labels: Tensor, axis: int
) -> None:
    """Turn the scale of a tensor into scales along a dimension, each as large as its group's share of the range.

    Args:
        quantizer: has one scale, or one for each group of timesteps.
        found: extremes along the dimension, as of `input_spreads`.
        dimension: a name of them.
        labels: [A] the group of each index.
        axis: of what the quantizer is given.
    """
    low, high = found[f"{dimension}.low"], found[f"{dimension}.high"]
    shares = relative_spans(low, high, labels, quantizer.format.symmetric).to(quantizer.scale.device)
    scale = quantizer.scale[..., None] * shares
    zero_point = quantizer.zero_point[..., None].expand_as(scale)
    quantizer.set(scale, zero_point, quantizer.edges if quantizer.banked else None, axis)
