"""DGQ's groups of tokens: scales along the sequence, outside of every sum (arXiv 2501.04304)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qdeploy.calibrate.groups import (
    CHANNELS,
    TOKENS,
    input_spreads,
    of_layer,
)
from qdeploy.calibrate.input_groups import (
    activation_format,
    check_group_count,
    labels_along,
    quantized_inputs,
    reads_some_channels,
    reference_dimension,
    set_group_scales,
)
from qdeploy.calibrate.session import Session
from qdeploy.quant.attention import AttentionQuantizers
from qdeploy.quant.layer import QuantizedLayer
from qdeploy.quant.patches import ROWS
from qdeploy.quant.quantizers import ActivationQuantizer
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
        attention: also group q, k and v, along their tokens or channels, as the paper's code does; no engine runs it.
    """

    name = "group-tokens"
    description = "scales for groups of tokens; locks the resolution"
    paper = "DGQ, arXiv 2501.04304"
    needs = (ACTIVATION_SCALES,)
    gives = (ACTIVATION_SCALES,)

    groups: int = 8
    channels: bool = False
    attention: bool = False

    def run(self, session: Session) -> None:
        """Give activation quantizers shares along the tokens."""
        number_format = activation_format(session, "group-tokens")
        if not number_format.symmetric and find_target(session.recipe.target).backends:
            raise UsageError(
                f"groups of tokens need a symmetric activation format, and {number_format.name} has a zero point: "
                "choose --activations int8, or --target simulated for research"
            )
        check_group_count(self.groups, {})
        free = {
            path: layer
            for path, layer in (next(iter(readers.items())) for readers in quantized_inputs(session))
            if not layer.split and layer.smoothing is None and layer.activation_quantizers[0].axis is None
        }
        tensors: dict[str, nn.Module] = {**free, **(_operands(session) if self.attention else {})}
        measured = session.draft.step(
            f"{session.stage}-measured",
            lambda: input_spreads(session, tensors, session.weights_only, "token ranges"),
        )
        plans: dict[str, tuple[ActivationQuantizer, str, int]] = {}
        for path, module in tensors.items():
            dimension = reference_dimension(of_layer(measured, path))
            if place := self._place(module, dimension):
                plans[path] = place

        def compute() -> None:
            for path, (quantizer, dimension, axis) in plans.items():
                found = of_layer(measured, path)
                labels = labels_along(session, found, dimension, self.groups)
                set_group_scales(quantizer, found, dimension, labels, axis)

        session.once("groups", compute)
        session.report["token_groups"] = {
            "layers": sum(dimension == TOKENS for path, (_, dimension, _) in plans.items() if path in free),
            "along": list(plans),
        }
        of_layers, of_attention = (
            sum(path in kind for path in plans) for kind in (free, tensors.keys() - free)
        )
        say(
            f"groups of tokens{' and channels' if self.channels else ''}: {of_layers} of {len(free)} tensors that "
            f"layers read, {of_attention} of {len(tensors) - len(free)} operands of attention"
        )

    def _place(self, module: nn.Module, dimension: str | None) -> tuple[ActivationQuantizer, str, int] | None:
        """Quantizer, name and axis of the dimension to group along, if there is one."""
        if isinstance(module, ActivationQuantizer):
            return None if dimension is None else (module, dimension, -2 if dimension == TOKENS else -1)
        assert isinstance(module, QuantizedLayer)
        (quantizer,) = module.activation_quantizers
        if dimension == TOKENS:
            return quantizer, TOKENS, -2
        if self.channels and dimension in (CHANNELS, ROWS) and not reads_some_channels(module):
            return quantizer, CHANNELS, module.feature_axis
        return None

    def simulated(self) -> str:
        """Why no engine can run the result."""
        if self.attention:
            return "no kernel of attention has scales for groups of q, k and v"
        return "a scale for each input channel has no place in an integer kernel" if self.channels else ""


def _operands(session: Session) -> dict[str, ActivationQuantizer]:
    """The quantizers of q, k and v that have one scale for the tensor, by name."""
    found: dict[str, ActivationQuantizer] = {}
    for path in session.structure.attentions:
        for module in session.denoiser.get_submodule(path).children():
            if isinstance(module, AttentionQuantizers):
                named = {"query": module.query, "key": module.key, "value": module.value}
                found |= {f"{path}.{name}": each for name, each in named.items() if each.axis is None}
    return found
