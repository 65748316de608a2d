"""Names that people and profilers recognise, without traces of the machine that exported the graph."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from qdeploy.export.graph import WEIGHTED_OPS, beside_a_layer

_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "denoiser."
_NOWHERE = ("denoiser", "_empty_nn_module_stack_from_metadata_hook")


class Names(InPlacePass):
    """Weighted nodes are named by their layer's path; initializers by their tensor's name in the checkpoint.

    1. A Conv, Gemm or MatMul that belongs to a weighted layer is named by the layer's path; if a layer
       has several (a split shortcut), ``/0``, ``/1``, ... follow.
    2. Every other node is named by the module that it came from and its operator.
    3. Initializers lose the prefixes that tracing added: quantizers are called as in
       `qdeploy.quant.state`.
    4. All metadata of the tracer is removed: it holds source paths of the machine.
    """

    def call(self, model: ir.Model) -> PassResult:
        own = Counter(path for node in model.graph if (path := _layer(node)))
        used: Counter[str] = Counter()
        for node in model.graph:
            path = _layer(node)
            if path and own[path] == 1:
                node.name = path
            else:
                base = path or f"{_module(node)}/{node.op_type}".lstrip("/")
                node.name = f"{base}/{used[base]}"
                used[base] += 1
        ClearMetadataAndDocStringPass()(model)
        values = (output for node in model.graph for output in node.outputs)
        for value in (*values, *model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
            value.metadata_props.clear()
        for traced, initializer in list(model.graph.initializers.items()):
            name = tensor_name(traced)
            if name != traced and name not in model.graph.initializers:
                model.graph.initializers.pop(traced)
                initializer.name = name
                model.graph.initializers[name] = initializer
        model.metadata_props.clear()
        model.graph.name = "denoiser"
        model.doc_string = None
        return PassResult(model, True)


def tensor_name(traced: str) -> str:
    """The checkpoint's name of a traced parameter or buffer."""
    before, stored_anew, _ = traced.rpartition("/")  # as `qdeploy.export.graph.writer` names constants
    if stored_anew and ".weight" in before:
        traced = before
    name = traced.removeprefix(_ROOT).replace(".inner.", ".")
    name = name.replace(".tuned_bias", ".bias")
    name = name.replace(".weight_quantizers.", ".weight.").replace(".input_quantizers.", ".input.")
    head, _, last = name.rpartition(".")
    if last == "frozen":
        return f"{head}.codes" if ".weight." in f"{head}." else f"{head}.zero_point"
    return name


def _scopes(node: ir.Node) -> list[str]:
    scopes = node.metadata_props.get(_SCOPES)
    return list(ast.literal_eval(scopes))[:-1] if scopes else []


def _module(node: ir.Node) -> str:
    """Path of the module that a node came from; empty for the network itself and for what has no origin."""
    scopes = _scopes(node)
    if not scopes or scopes[-1] in _NOWHERE:
        return ""
    return scopes[-1].removeprefix(_ROOT).removesuffix(".inner")


def _layer(node: ir.Node) -> str | None:
    if node.op_type not in WEIGHTED_OPS:
        return None
    # An attention product is a MatMul too, but neither of its inputs leads to a stored weight.
    weight = node.inputs[1]
    while weight is not None and weight.const_value is None:
        before = weight.producer()
        if before is None or before.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Cast"):
            return None
        weight = before.inputs[0]
    name = tensor_name(weight.name or "") if weight is not None else ""
    if beside_a_layer(weight):
        return None
    path, found, _ = name.rpartition(".weight")
    # Exporters merge equal tensors: a weight may have the name of another layer's.
    module = _module(node)
    return path if found and f"{path}.".startswith(f"{module}." if module else "") else module or None
