"""Targets are dialects: which rewrites make a traced graph into what a target can fuse."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, Sequential
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

from qdeploy.export.lint.fixes.plain import Folded, KnownVersion
from qdeploy.export.passes.channelwise_norms import ChannelwiseNorms, ChannelwiseNormsByMeans
from qdeploy.export.passes.gathered_convolutions import GatheredConvolutions
from qdeploy.export.passes.integer_products import IntegerProducts
from qdeploy.export.passes.names import Names
from qdeploy.export.passes.packed_codes import PackedCodes
from qdeploy.export.passes.pixels_as_tokens import PixelsAsTokens
from qdeploy.export.passes.scaled_scores import ScaledScores
from qdeploy.export.passes.shared_computations import SharedComputations
from qdeploy.export.passes.shared_quantizers import SharedQuantizers
from qdeploy.export.passes.split_shortcut import SplitShortcut
from qdeploy.export.passes.sunk_transpositions import SunkTranspositions
from qdeploy.export.passes.transposed_keys import TransposedKeys
from qdeploy.export.passes.transposed_weights import TransposedWeights
from qdeploy.export.passes.unsigned_codes import UnsignedCodes
from qdeploy.export.passes.upsampled_convolutions import UpsampledConvolutions
from qdeploy.system.errors import CapabilityError
from qdeploy.system.plugins import PASSES as GROUP
from qdeploy.system.plugins import objects
from qdeploy.system.progress import say

_COMMON: tuple[type[InPlacePass], ...] = (
    SplitShortcut,
    TransposedWeights,
    SharedComputations,
    SharedQuantizers,
)

# For engines whose convolutions keep channels last. `build-engine` runs them for OpenVINO whatever the dialect of the
# bundle, so that a portable one is as fast.
CHANNELS_LAST: tuple[type[InPlacePass], ...] = (
    PixelsAsTokens,
    TransposedKeys,
    ScaledScores,
    ChannelwiseNorms,
    SharedComputations,
)

# The same, and what changes layers that are float: for engines alone, since a bundle names a network's own layers.
AS_BUILT: tuple[type[InPlacePass], ...] = (UpsampledConvolutions, *CHANNELS_LAST)

PASSES: dict[str, tuple[type[InPlacePass], ...]] = {
    "portable": _COMMON,
    "tensorrt": (*_COMMON, PackedCodes, Folded, KnownVersion),
    "openvino": (*_COMMON, *CHANNELS_LAST, PackedCodes),
    "onnxruntime": (
        *_COMMON,
        PackedCodes,
        UnsignedCodes,
        IntegerProducts,
        GatheredConvolutions,
        ChannelwiseNormsByMeans,
        SunkTranspositions,
        SharedComputations,
    ),
}


def lower(model: ir.Model, target: str) -> ir.Model:
    """Rewrite a traced graph for a target; the numbers in it stay the same."""
    rewrites = registered_passes(target)
    adapt(model, PASSES[target])
    for rewrite in rewrites:
        changed = adapt(model, (rewrite,))
        say(f"pass {path_of(rewrite)}: {'changed the graph' if changed else 'found nothing to change'}")
    return Names()(model).model


def registered_passes(target: str) -> list[type[InPlacePass]]:
    """Passes of other packages for a target; they run behind its own, in the order of their entry points.

    A pass names its targets in ``targets``, a tuple of names of `qdeploy.recipe.targets`.

    Raises:
        CapabilityError: a package registers one that cannot be imported, or that names no target or an unknown one.
    """
    return [rewrite for rewrite in other_passes() if target in rewrite.targets]


def other_passes() -> list[type[Any]]:
    """All passes of other packages, for any target.

    Raises:
        CapabilityError: as of `registered_passes`.
    """
    found = objects(GROUP, lambda value: isinstance(value, type) and issubclass(value, InPlacePass))
    for package, rewrite in found:
        targets = getattr(rewrite, "targets", ())
        if not isinstance(targets, tuple | list) or not targets or not set(targets) <= PASSES.keys():
            raise CapabilityError(
                f"the pass {path_of(rewrite)} of {package} has targets {targets!r}: give it a tuple of some of "
                f"{', '.join(PASSES)}"
            )
    return [each.value for each in found]


def path_of(rewrite: type[InPlacePass]) -> str:
    """A pass in messages and requests: its module and its name."""
    return f"{rewrite.__module__}.{rewrite.__qualname__}"


def adapt(model: ir.Model, rewrites: tuple[type[InPlacePass], ...]) -> bool:
    """Rewrite a graph in place, and tidy it up; names stay.

    Returns:
        Whether a rewrite fired.
    """
    fired = [rewrite()(model).modified for rewrite in rewrites]
    clean = (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
        TopologicalSortPass(),
    )
    Sequential(*clean)(model)
    return any(fired)
