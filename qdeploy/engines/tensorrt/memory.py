"""How much memory a plan will need, before it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import onnx_ir as ir

from qdeploy.engines.tensorrt.graph import Graph
from qdeploy.engines.tensorrt.options import GIB, Options
from qdeploy.engines.tensorrt.profiles import Profile
from qdeploy.export.graph.network import Network
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.gpu import Gpu
from qdeploy.system.progress import say

# Bytes of an activation, were nothing of it quantized.
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def activation_peak(path: Path, shapes: Mapping[str, Sequence[int]], itemsize: int) -> int:
    """Bytes of activations alive at once when nodes run in the file's order and nothing is fused.

    TensorRT fuses, so that it needs less; on the other hand it may choose formats that pad channels.

    Args:
        path: the ONNX file.
        shapes: shapes of all inputs.
        itemsize: bytes of an element.

    Raises:
        InvalidInputError: the file is no ONNX graph, or the shapes contradict each other.
    """
    network = Network(path, shapes)
    if network.contradiction is not None:
        raise InvalidInputError(network.contradiction)
    last = {value: index for index, node in enumerate(network.nodes) for value in node.inputs}
    alive: dict[ir.Value, int] = {}
    peak = 0
    for index, node in enumerate(network.nodes):
        sizes = {value: network.shape(value) for value in node.outputs}
        alive |= {value: prod(size) * itemsize for value, size in sizes.items() if size is not None}
        peak = max(peak, sum(alive.values()))
        for value in (*node.inputs, *node.outputs):
            if value in alive and last.get(value, len(network.nodes)) <= index:
                del alive[value]
    return peak


def estimate(path: Path, graph: Graph, profiles: Sequence[Profile], options: Options) -> dict[str, int]:
    """Bytes that a plan will need on the GPU: weights, activations at the largest shapes, scratch."""
    itemsize = _BYTES[options.precision]
    weights = graph.weight_bytes if graph.low_bit else graph.weight_bytes * itemsize // 4
    activations = 0
    for profile in profiles:
        shapes = {port.name: port.shape for port in graph.inputs if not port.dynamic}
        shapes |= {name: shapes_.largest for name, shapes_ in profile.items()}
        fixed = {name: [int(size) for size in shape] for name, shape in shapes.items()}
        try:
            activations = max(activations, activation_peak(path, fixed, itemsize))
        except InvalidInputError:  # no reason to refuse: TensorRT's own message will state the cause
            continue
    return {"weights": weights, "activations": activations, "workspace": options.workspace_bytes or 0}


def warn_if_tight(needed: Mapping[str, int], gpu: Gpu, options: Options) -> None:
    """Say so before a long build where the plan will hardly fit."""
    total = sum(needed.values())
    if total > gpu.memory and not options.weight_streaming:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items() if size)
        say(
            f"warning: the plan may need {total / GIB:.1f} GiB ({parts}), the {gpu.name} has "
            f"{gpu.memory / GIB:.1f}: smaller --shapes, --workspace or --weight-streaming help"
        )
