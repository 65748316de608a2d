"""The engine inspector's description of a plan: layers, types and tactics, as TensorRT 10, 11 and RTX 1 give it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

from qdeploy.engines.base import Kernel
from qdeploy.system.errors import InvalidInputError

# Beginnings of what the inspector writes for types, by our words for them.
_PRECISIONS = {
    "int8": "int8", "int4": "int4", "fp8": "fp8", "fp4": "fp4", "fp4e2m1": "fp4", "half": "f16", "fp16": "f16",
    "bf16": "bf16",
    "bfloat16": "bf16", "float": "f32", "fp32": "f32", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
LOW_BIT = ("int4", "fp4", "int8", "fp8")
# In 10.x and 11.x the nodes of origin stand in the metadata, apart by control characters.
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# ``correlation`` is what Myelin, TensorRT's compiler, calls a convolution.
_MULTIPLIES = ("conv", "correlation", "gemm", "matmul", "matrixmultiply", "attention", "mha")
_FUSED_PRODUCTS = ("gemm", "xmma", "conv", "mha")
# Myelin names what it fuses by its operations, as in __myl_ReplCastMulCastFc_myl0_0: Fc is a fully connected layer.
_FULLY_CONNECTED = re.compile(r"^__myl_\w*Fc(?![a-z])")


def read_layers(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """The layers of an engine as the inspector tells them, details included.

    Raises:
        InvalidInputError: the inspector gives nothing that can be read.
    """
    inspector = engine.create_engine_inspector()
    return parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def parse_layers(text: str) -> list[dict[str, Any]]:
    """The layers in the inspector's JSON. A plan without details gives names alone.

    Raises:
        InvalidInputError: it is no such JSON.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError("TensorRT's engine inspector gave nothing readable: build again") from error
    return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]


def dtype(tensor: Mapping[str, Any]) -> str:
    """The type of an input or output of a layer.

    Until 10.x one field holds format and type, as in ``Two wide channel vectorized FP16 format`` or
    ``Int8 NC/32HW32``; 11.x splits them.
    """
    stated = next((tensor[key] for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    words = re.findall(r"[a-z0-9]+", str(stated).lower())
    return next((_PRECISIONS[word] for word in words if word in _PRECISIONS), "")


def kernels(layers: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """Layers in the words that all engines use."""
    return [_kernel(layer) for layer in layers]


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, tactic = str(layer.get("Name", "")), str(layer.get("TacticName", ""))
    kinds = [str(layer[key]) for key in ("ParameterType", "LayerType") if key in layer]
    # A fused region of Myelin's calls itself kgen; its tactic tells whether it multiplies.
    kind = next((k for k in kinds if _has(k, _MULTIPLIES)), None)
    if kind is None:
        kind = (
            f"{kinds[-1]} gemm"
            if kinds and (_has(tactic, _FUSED_PRODUCTS) or _FULLY_CONNECTED.match(name))
            else "".join(kinds[-1:])
        )
    origin = _ONNX_LAYER.findall(str(layer.get("Metadata", ""))) or [
        part.strip() for part in name.split(" + ")
    ]
    # A weight of fewer bits than its input stands among the constants.
    types = [dtype(tensor) for side in ("Inputs", "Constants") for tensor in layer.get(side, [])]
    low = next((kind for kind in types if kind in LOW_BIT), None)
    precision = low or next(filter(None, types), "")
    return Kernel(
        name, tuple(dict.fromkeys(filter(None, origin))), kind, precision, tactic or "".join(kinds[-1:])
    )


def multiplies(kernel: Kernel) -> bool:
    """Whether a kernel computes a matrix product or a convolution."""
    return _has(kernel.kind, _MULTIPLIES)


def _has(text: str, words: Sequence[str]) -> bool:
    return any(word in text.lower() for word in words)


def report(layers: Sequence[Mapping[str, Any]], planned: Mapping[str, str]) -> dict[str, Any]:
    """Which of the planned layers really run in low bits.

    Args:
        layers: see `parse_layers`.
        planned: the type that each node was quantized to multiply in, by its name.

    Returns:
        ``planned`` and ``as_planned``, numbers of nodes; ``kinds``, those that run as planned by type;
        ``in_float`` and ``in_other`` as node: type and kernel; ``not_found``; ``products``, the plan's own products
        by type, where nodes that read one tensor may be merged into one; ``reformats``, the number of layers that
        only move data; and ``detailed``, whether the plan tells types at all.
    """
    ran: dict[str, Kernel] = {}
    every = [kernel for kernel in kernels(layers) if multiplies(kernel)]
    for kernel in every:
        ran |= {name: kernel for name in kernel.layers if name in planned}
    right = {name for name, kernel in ran.items() if kernel.precision == planned[name]}
    wrong = {
        name: f"{kernel.precision or 'unknown'} {kernel.type}".strip()
        for name, kernel in sorted(ran.items())
        if name not in right
    }
    return {
        "planned": len(planned),
        "as_planned": len(right),
        "kinds": dict(sorted(Counter(planned[name] for name in right).items())),
        "in_float": {name: what for name, what in wrong.items() if ran[name].precision not in LOW_BIT},
        "in_other": {name: what for name, what in wrong.items() if ran[name].precision in LOW_BIT},
        "not_found": sorted(planned.keys() - ran.keys()),
        "products": dict(sorted(Counter(kernel.precision or "unknown" for kernel in every).items())),
        "reformats": sum(_has(str(layer.get("LayerType", "")), ("reformat",)) for layer in layers),
        "detailed": any("Inputs" in layer for layer in layers),
    }


def wide_results(
    layers: Sequence[Mapping[str, Any]], planned: Mapping[str, str], per_channel: Set[str]
) -> dict[str, str]:
    """Low-bit products that write float32, and why: four bytes an element where 16 bits take two.

    Args:
        layers: see `parse_layers`.
        planned: see `report`.
        per_channel: names of the nodes whose weights have a scale for each output channel.

    Returns:
        The reason by the node's name.
    """
    found = {}
    for layer, kernel in zip(layers, kernels(layers), strict=True):
        names = [name for name in kernel.layers if name in planned]
        outputs = [dtype(tensor) for tensor in layer.get("Outputs", [])]
        if names and kernel.precision in LOW_BIT and multiplies(kernel) and outputs == ["f32"]:
            for name in names:
                found[name] = (
                    "its weights have a scale for each output channel, which the next kernel multiplies in float32"
                    if name in per_channel
                    else "no reason is known"
                )
    return found
