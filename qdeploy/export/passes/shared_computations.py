"""Compute once what several layers compute from one tensor in the same way."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import WEIGHTED_OPS, beside_a_layer, constant

LARGEST = 2**20  # bytes of a constant that is compared by its content
_OTHERS = (
    *WEIGHTED_OPS,
    *("QuantizeLinear", "DequantizeLinear"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
)
_PLAIN = tuple(
    getattr(ir.AttributeType, f"{kind}{many}") for kind in ("INT", "FLOAT", "STRING") for many in ("", "S")
)


class SharedComputations(InPlacePass):
    """Equal nodes on equal inputs become one node.

    Layers that read one tensor (q, k and v) each have a copy of the factors, the permutation and the
    lookup before their quantizer, with constants of their own.

    1. Two nodes have the same operator and equal attributes.
    2. Their inputs are the same tensors, or constants of equal type and content; one at least is no constant.
    3. Then the later one's users read the earlier one's outputs.

    It does not fire on weighted nodes, which have the names of their layers, but for products with rotations; on
    Q/DQ, which are left to `SharedQuantizers`; on random numbers; on nodes with a graph or a tensor of their own;
    nor where an output is an output of the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        seen: dict[tuple[object, ...], ir.Node] = {}
        for node in list(model.graph):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                for output, same in zip(node.outputs, first.outputs, strict=True):
                    ir.convenience.replace_all_uses_with(output, same)
                model.graph.remove(node, safe=True)
                modified = True
        return PassResult(model, modified)


def _key(node: ir.Node) -> tuple[object, ...] | None:
    """What equal nodes have in common; None for those that stay as they are."""
    rotates = node.op_type == "MatMul" and beside_a_layer(node.inputs[1])
    if (node.op_type in _OTHERS and not rotates) or any(output.is_graph_output() for output in node.outputs):
        return None
    attributes = node.attributes.values()
    if any(attribute.type not in _PLAIN for attribute in attributes):
        return None
    inputs = [_identity(value) for value in node.inputs]
    if not any(isinstance(identity, int) for identity in inputs):
        return None
    described = sorted(f"{a.name}={a.type}:{a.value}" for a in attributes)
    return node.domain, node.op_type, node.overload, len(node.outputs), *inputs, *described


def _identity(value: ir.Value | None) -> object:
    """Type and content of a small constant; else a number that is the value's own."""
    if value is None:
        return None
    known = value.const_value
    if known is None or known.nbytes > LARGEST:
        return id(value)
    array = constant(value)
    return (str(value.dtype), array.shape, array.tobytes())
