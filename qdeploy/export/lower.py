"""Targets are dialects: which rewrites make a traced graph into what a target can fuse."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, Sequential
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

from qdeploy.export.lint.fixes.plain import Folded, KnownVersion
from qdeploy.export.passes.names import Names
from qdeploy.export.passes.packed_codes import PackedCodes
from qdeploy.export.passes.shared_quantizers import SharedQuantizers
from qdeploy.export.passes.split_shortcut import SplitShortcut
from qdeploy.export.passes.transposed_weights import TransposedWeights

_COMMON: tuple[type[InPlacePass], ...] = (SplitShortcut, TransposedWeights, SharedQuantizers)

PASSES: dict[str, tuple[type[InPlacePass], ...]] = {
    "portable": _COMMON,
    "tensorrt": (*_COMMON, PackedCodes, Folded, KnownVersion),
    "openvino": _COMMON,
    "onnxruntime": _COMMON,
}


def lower(model: ir.Model, target: str) -> ir.Model:
    """Rewrite a traced graph for a target; the numbers in it stay the same."""
    passes = [rewrite() for rewrite in PASSES[target]]
    clean = (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
        TopologicalSortPass(),
    )
    return Sequential(*passes, *clean, Names())(model).model
