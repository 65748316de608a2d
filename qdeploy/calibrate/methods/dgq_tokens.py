"""DGQ's groups of tokens: scales along the sequence, outside of every sum (arXiv 2501.04304)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    input_spreads,
    of_layer,
)
from qdeploy.calibrate.input_groups import (
    activation_format,
    check_groups,
    give_shares,
    labels_along,
    layer_families,
    reads_some_channels,
    reference_dimension,
)
from qdeploy.calibrate.session import Session
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import ROWS
from qdeploy.recipe.stages import ACTIVATION_SCALES, Stage
from qdeploy.recipe.targets import find_target
from qdeploy.system.errors import UsageError
from qdeploy.system.progress import say


@dataclass(frozen=True)
class GroupTokens(Stage):
    """Give the tokens of linear layers scales by groups, where they differ more than the channels do.

    The scale of a token is that of the tensor times its group's share of the range. It stands outside of the
    layer's sum, so an engine runs it, for the number of tokens that was calibrated and no other: the
    resolution is locked. Layers whose channels have groups are left as they are. Running it raises `UsageError` for
    an impossible number of groups, no activations to group, or a format with a zero point that an engine would
    have to move.

    Attributes:
        groups: G, how many groups at most; 1 changes nothing.
        channels: also give layers whose channels differ more a scale for each channel, weights as they are:
            the paper's own form, which no engine runs.
    """

    name = "group-tokens"
    description = "scales for groups of tokens; locks the resolution"
    paper = "DGQ, arXiv 2501.04304"
    needs = (ACTIVATION_SCALES,)
    gives = (ACTIVATION_SCALES,)

    groups: int = 8
    channels: bool = False

    def run(self, session: Session) -> None:
        """Give activation quantizers shares along the tokens."""
        number_format = activation_format(session, "group-tokens")
        if not number_format.symmetric and find_target(session.recipe.target).backends:
            raise UsageError(
                f"groups of tokens need a symmetric activation format, and {number_format.name} has a zero point: "
                "choose --activations int8, or --target simulated for research"
            )
        check_groups(self.groups, {})
        free = {
            layers[0].path: modules[0]
            for layers, modules in layer_families(session)
            if not modules[0].split
            and modules[0].smoothing is None
            and modules[0].activation_quantizers[0].axis is None
        }
        measured = session.draft.step(
            f"{session.stage}-measured",
            lambda: input_spreads(session, free, session.weights_only, "token ranges"),
        )
        chosen = {path: reference_dimension(of_layer(measured, path)) for path in free}

        def compute() -> None:
            for path, layer in free.items():
                dimension = _axis_of(layer, chosen[path], self.channels)
                if dimension:
                    _scale_along(session, layer, of_layer(measured, path), *dimension, self.groups)

        session.once("groups", compute)
        given = [path for path, layer in free.items() if _axis_of(layer, chosen[path], self.channels)]
        session.report["token_groups"] = {
            "layers": sum(chosen[path] == TOKENS for path in given),
            "along": given,
        }
        say(f"groups of tokens: {len(given)} of {len(free)} tensors that layers read")

    def simulated(self) -> str:
        """Why no engine can run the result."""
        return "a scale for each input channel has no place in an integer kernel" if self.channels else ""


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


def _needs_wide_sums(options: Mapping[str, Any]) -> str:
    return "a scale for each input channel has no place in an integer kernel" if options["channels"] else ""
