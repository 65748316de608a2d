"""The exporter's search for pairs of slices, in time that grows with the graph and not with its square.

onnxscript's optimizer, which `torch.onnx.export` runs, turns two slices that halve one tensor into a Split. Its rule
for this has two outputs, and a pattern of several outputs is matched by walking the whole graph once for every node
of it (``SimplePatternMatcher.match``, version 0.7.2): more than ten minutes for a graph of 26,000 nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir


@contextmanager
def quick_slice_pairs() -> Iterator[None]:
    """Within, onnxscript's rule for slices is asked only where a tensor has two of them; it finds the same pairs."""
    try:
        from onnxscript.rewriter.rules.common import slice_split_rule as rule
    except ImportError:  # another version's rules are as they are
        yield
        return
    rewrite = rule.try_rewrite

    def guarded(model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        return rewrite(model, graph, node, **options) if has_sibling(node) else None

    rule.try_rewrite = guarded
    try:
        yield
    finally:
        rule.try_rewrite = rewrite


def has_sibling(node: ir.Node) -> bool:
    """Whether a node is a slice of something that another slice reads too."""
    source = node.inputs[0] if node.op_type == "Slice" else None
    return source is not None and any(
        other is not node and other.op_type == "Slice" for other in source.consumers()
    )
