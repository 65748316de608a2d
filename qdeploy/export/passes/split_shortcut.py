"""Feed the two convolutions of a split shortcut from before the Concat."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant, producer


class SplitShortcut(InPlacePass):
    """``Split(Concat(a, b))`` becomes ``a`` and ``b``.

    A split shortcut quantizes the halves of a concatenation on their own. Traced, it cuts the
    concatenated tensor apart again; an engine that met Q/DQ behind the Concat would be free to move them
    before it and merge both to one scale, which undoes the method (Q-Diffusion, section 3.3.2).

    1. The Split's input is a Concat over the same axis.
    2. Every output of the Split is as large as the Concat's input in its place.
    3. Then the outputs are replaced by the inputs and the Split is removed; the Concat stays for its other
       users.

    It does not fire when sizes are unknown or differ, nor where a part is an output of the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            parts = _parts(node)
            if parts is None:
                continue
            for output, part in zip(node.outputs, parts, strict=True):
                ir.convenience.replace_all_uses_with(output, part)
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified)


def _parts(node: ir.Node) -> list[ir.Value] | None:
    if node.op_type != "Split" or any(output.is_graph_output() for output in node.outputs):
        return None
    concat = producer(node.inputs[0])
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if concat is None or concat.op_type != "Concat" or sizes is None:
        return None
    rank = node.inputs[0].shape.rank() if node.inputs[0] is not None and node.inputs[0].shape else None
    if rank is None or len(concat.inputs) != len(node.outputs):
        return None
    axis = node.attributes.get_int("axis", 0)
    if axis % rank != concat.attributes["axis"].as_int() % rank:
        return None
    parts = [part for part in concat.inputs if part is not None]
    for part, size in zip(parts, sizes.tolist(), strict=True):
        if part.shape is None or part.shape[axis % rank] != size:
            return None
    return parts
