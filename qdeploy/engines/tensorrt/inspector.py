"""What a plan says of itself: layers, types and tactics, in the schemas of TensorRT 10 and 11."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.engines.base import Kernel
from qdeploy.system.errors import InvalidInputError

# Beginnings of what the inspector writes for types, by our words for them.
_PRECISIONS = {
    "int8": "int8", "int4": "int4", "fp8": "fp8", "fp4": "fp4", "half": "f16", "fp16": "f16", "bf16": "bf16",
    "bfloat16": "bf16", "float": "f32", "fp32": "f32", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_LOW_BIT = ("int4", "fp4", "int8", "fp8")
# In 10.x and 11.x the nodes of origin stand in the metadata, apart by control characters.
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MULTIPLIES = ("conv", "gemm", "matmul", "matrixmultiply", "attention", "mha")


def read_layers(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """The layers of an engine as the inspector tells them, details included.

    Raises:
        InvalidInputError: the inspector gives nothing that can be read.
    """
    inspector = engine.create_engine_inspector()
    told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return parse_layers(told)


def parse_layers(told: str) -> list[dict[str, Any]]:
    """The layers in the inspector's JSON. A plan without details gives names alone.

    Raises:
        InvalidInputError: it is no such JSON.
    """
    try:
        layers = json.loads(told)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError("TensorRT's engine inspector gave nothing readable: build again") from error
    return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]


def dtype(tensor: Mapping[str, Any]) -> str:
    """The type of an input or output of a layer.

    Until 10.x one field holds format and type, as in ``Two wide channel vectorized FP16 format`` or
    ``Int8 NC/32HW32``; 11.x splits them.
    """
    told = next((tensor[key] for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    words = re.findall(r"[a-z0-9]+", str(told).lower())
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
            f"{kinds[-1]} gemm" if kinds and _has(tactic, ("gemm", "xmma", "conv")) else "".join(kinds[-1:])
        )
    origin = _ONNX_LAYER.findall(str(layer.get("Metadata", ""))) or [
        part.strip() for part in name.split(" + ")
    ]
    types = [dtype(tensor) for tensor in layer.get("Inputs", [])]
    low = next((kind for kind in types if kind in _LOW_BIT), None)
    precision = low or next(filter(None, types), "")
    return Kernel(
        name, tuple(dict.fromkeys(filter(None, origin))), kind, precision, tactic or "".join(kinds[-1:])
    )


def _has(text: str, words: Sequence[str]) -> bool:
    return any(word in text.lower() for word in words)


def report(layers: Sequence[Mapping[str, Any]], planned: set[str]) -> dict[str, Any]:
    """Which of the planned layers really run in low bits.

    Args:
        layers: as of `parse_layers`.
        planned: names of the nodes that were quantized to run so.

    Returns:
        ``as_planned``, ``in_float`` as node: type and kernel, ``not_found``; ``reformats``, the number of
        layers that only move data; and ``detailed``, whether the plan tells types at all.
    """
    ran: dict[str, Kernel] = {}
    for kernel in kernels(layers):
        if _has(kernel.kind, _MULTIPLIES):
            ran |= {name: kernel for name in kernel.layers if name in planned}
    low = {name for name, kernel in ran.items() if kernel.precision in _LOW_BIT}
    return {
        "planned": len(planned),
        "as_planned": len(low),
        "in_float": {
            name: f"{kernel.precision or 'unknown'} {kernel.type}".strip()
            for name, kernel in sorted(ran.items())
            if name not in low
        },
        "not_found": sorted(planned - ran.keys()),
        "reformats": sum(_has(str(layer.get("LayerType", "")), ("reformat",)) for layer in layers),
        "detailed": any("Inputs" in layer for layer in layers),
    }
