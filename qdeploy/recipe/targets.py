"""What each target can run, as data.

A target is the grid that rounding has to know when it calibrates, and the dialect of Q/DQ that export
writes. ``portable`` is the intersection that every engine runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.recipe.formats import BLOCKS
from qdeploy.system.errors import UsageError
from qdeploy.system.suggest import unknown


@dataclass(frozen=True)
class Target:
    """An engine's abilities.

    Attributes:
        name: the word that recipes use.
        description: one line for people.
        weights: weight formats that it runs. Weights of fewer bits are codes of an int8 kernel: for b <= 7,
            q - zero_point always fits into int8, bit for bit. Those in blocks stay four bits wide.
        activations: activation formats that it runs.
        attention: whether softmax(QK)V can run in integers.
        backends: the engines that take this dialect.
        thin: whether layers are quantized that are too thin to gain (`qdeploy.recipe.kernel_limits`).
        pointwise: whether convolutions of one pixel take weights in blocks; they are written as products of matrices.
    """

    name: str
    description: str
    weights: frozenset[str]
    activations: frozenset[str]
    attention: bool
    backends: tuple[str, ...]
    thin: bool = True
    pointwise: bool = True


_WEIGHTS = frozenset({"int8", "int7", "int6", "int5", "int4", "uint4", "int3", "none"})
_BLOCKS = frozenset(f"int{bits}b{block}" for bits in (4, 8) for block in BLOCKS)

TARGETS = {
    target.name: target
    for target in (
        Target(
            "portable",
            "symmetric int8 per tensor, symmetric weights per channel: runs on every engine",
            _WEIGHTS,
            frozenset({"int8", "none"}),
            attention=False,
            backends=("openvino", "onnxruntime", "tensorrt"),
        ),
        Target(
            "tensorrt",
            "TensorRT on GPUs: symmetric int8 in layers wide enough to gain; fp8; nvfp4; int4 weights in blocks",
            _WEIGHTS | {"int4b64", "int4b128", "fp8", "nvfp4"},
            frozenset({"int8", "fp8", "nvfp4", "none"}),
            attention=False,
            backends=("tensorrt", "onnxruntime"),
            thin=False,
            pointwise=False,
        ),
        Target(
            "openvino",
            "OpenVINO on CPUs: also asymmetric uint8 activations, and int8 attention; weights in blocks",
            _WEIGHTS | _BLOCKS,
            frozenset({"int8", "uint8", "int8-dynamic", "none"}),
            attention=True,
            backends=("openvino", "onnxruntime"),
        ),
        Target(
            "onnxruntime",
            "ONNX Runtime on CPUs: integer products in its own operators; uint8 activations; weights in blocks",
            _WEIGHTS | _BLOCKS,
            frozenset({"int8", "uint8", "int8-dynamic", "none"}),
            attention=False,
            backends=("onnxruntime",),
        ),
        Target(
            "simulated",
            "every format and every layer, in torch only: for research, no engine runs it",
            _WEIGHTS | _BLOCKS | {"uint8", "uint6"},
            frozenset({"int8", "uint8", "int6", "uint6", "int4", "uint4", "int8-dynamic", "none"}),
            attention=True,
            backends=(),
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(unknown("target", name, TARGETS))
    return TARGETS[name]
