"""Group norms that round to int8 in their own kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qdeploy.export.graph import constant
from qdeploy.export.graph.quantizer import INT8, read_quantizer
from qdeploy.export.graph.writer import Writer

_MOVES = ("Reshape", "Transpose")
_LOWEST = 128  # code -128 is the smallest, whatever lies below


class ClampedNorms(InPlacePass):
    """``Q(GroupNormalization(x))`` becomes ``Q(Relu(GroupNormalization(x) + 128 s) - 128 s)``, s the scale of Q.

    What lies below ``-128 s`` is code -128 either way, so that the codes are the same. TensorRT for RTX rounds
    in the kernel of a group norm only where an activation function comes between, as in the blocks of a U-Net; a norm
    in front of attention has none, and is written in 16 bits and read again by a kernel that does nothing but round.
    The sum is the norm's bias: the rewritten norm costs nothing.

    1. A GroupNormalization with a constant bias has one reader, a QuantizeLinear to int8 with one constant scale;
       Reshapes and Transposes may lie between.
    2. Then ``128 s`` is added to its bias, and a Relu and a subtraction are put behind it.

    In half precision the sum is rounded to a sixteenth of a step of Q at worst. In bfloat16 that would be a
    whole step: there it must not run.
    """

    def call(self, model: ir.Model) -> PassResult:
        found = [(node, step) for node in model.graph if (step := _step(node)) is not None]
        for node, step in found:
            _rewrite(model, node, step)
        return PassResult(model, bool(found))


def _step(node: ir.Node) -> np.float32 | None:
    """The scale of the quantizer that alone reads a group norm."""
    if node.op_type != "GroupNormalization" or constant(node.inputs[2]) is None:
        return None
    value = node.outputs[0]
    reader = _only_reader(value)
    while reader is not None and reader.op_type in _MOVES and reader.inputs[0] is value:
        value = reader.outputs[0]
        reader = _only_reader(value)
    quantizer = read_quantizer(reader)
    if quantizer is None or not quantizer.quantizes or quantizer.codes != INT8 or quantizer.data is not value:
        return None
    scales = quantizer.scales
    zero = constant(quantizer.zero_point)
    if scales is None or scales.size != 1 or (zero is not None and zero.any()):
        return None
    return np.float32(scales.reshape(())[()])


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _rewrite(model: ir.Model, node: ir.Node, step: np.float32) -> None:
    result = node.outputs[0]
    users = list(result.uses())
    shift = np.float32(_LOWEST) * step
    bias = constant(node.inputs[2])
    write = Writer(model, node, behind=True)
    node.replace_input_with(2, write.constant((bias + shift).astype(bias.dtype), "bias"))
    positive = write.node("Relu", result, shape=result.shape)
    shifted = write.node("Sub", positive, write.constant(np.array(shift), "lowest"), shape=result.shape)
    for user, position in users:
        user.replace_input_with(position, shifted)
