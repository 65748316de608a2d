"""Which number formats a target runs, and which go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qdeploy.recipe.formats import NONE, parse_format
from qdeploy.recipe.stages import Stage
from qdeploy.recipe.targets import TARGETS, Target, find_target
from qdeploy.system.errors import UsageError


def check_formats(pairs: Iterable[tuple[str, str]], target: str, stages: Sequence[Stage]) -> None:
    """Refuse formats that a target or one of a recipe's stages cannot use.

    Args:
        pairs: formats of weights and activations that layers have.
        target: name of the target.
        stages: the stages.

    Raises:
        UsageError: a format is unknown, the target has no kernel for it, or two have none together.
    """
    for weights, activations in pairs:
        _check_pair(weights, activations, find_target(target), stages)


def check_unblocked(weights: str, unblocked: str, target: str) -> None:
    """Refuse a format for the weights that blocks do not fit, if it is impossible or has no use.

    Raises:
        UsageError: it is.
    """
    if unblocked == NONE:
        return
    blocks, others = parse_format(weights), parse_format(unblocked)
    if blocks is None or not blocks.block:
        raise UsageError(f"'unblocked' is for weights in blocks, and weights are {weights!r}: leave it out")
    fitting = ("fp8", "int8") if blocks.two_levels else ("int8",)
    if others is None or others.block or (unblocked not in fitting if blocks.two_levels else others.floating):
        raise UsageError(
            f"layers that blocks do not fit cannot have {unblocked} weights: choose {', '.join(fitting)}, or none"
        )
    _check_pair(unblocked, unblocked if blocks.two_levels else NONE, find_target(target), ())


def _check_pair(weights_name: str, activations_name: str, target: Target, stages: Sequence[Stage]) -> None:

    for part, name in (("weights", weights_name), ("activations", activations_name)):
        allowed = getattr(target, part)
        parse_format(name)
        if name not in allowed:
            able = [other.name for other in TARGETS.values() if name in getattr(other, part)]
            others = "simulated for research" if "simulated" in able else _words(able)
            where = f", or --target {others}" if able else ""
            raise UsageError(
                f"target {target.name} cannot run {name} {part}: choose {_words(allowed)}{where}"
            )
    weights, activations = parse_format(weights_name), parse_format(activations_name)
    dynamic = activations is not None and activations.dynamic
    if weights and weights.block and not weights.two_levels and activations and not dynamic:
        fitting = " or ".join(name for name in ("int8-dynamic", "none") if name in target.activations)
        raise UsageError(
            f"{weights.name} weights have no product with calibrated {activations.name} activations: choose "
            f"--activations {fitting}"
        )
    if dynamic and not (weights and weights.block):
        raise UsageError(
            f"runtimes round activations by themselves in front of weights in blocks only, not of {weights_name}: "
            "choose weights such as int4b64 or int8b128, or --activations int8"
        )
    floats = [each.name for each in (weights, activations) if each and each.floating]
    if floats and weights_name != activations_name:
        raise UsageError(
            f"{weights_name} weights and {activations_name} activations have no kernel together: {floats[0]} needs "
            f"both in {floats[0]}"
        )
    uniform = [stage.name for stage in stages if stage.uniform]
    if weights and weights.floating and uniform:
        raise UsageError(
            f"stage {uniform[0]} needs equal steps, and those of {weights.name} grow with the "
            "value: choose --method minmax or qdiffusion, or integers"
        )


def _words(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
