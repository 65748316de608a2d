"""The two TensorRTs as values: one code builds and runs both, and asks these values where they differ.

TensorRT needs the GPU that it builds for. TensorRT for RTX compiles ahead of time for named compute capabilities on
any machine, and leaves the choice of kernels to a just-in-time compiler on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdeploy.system.gpu import TENSORRT_PACKAGES


@dataclass(frozen=True)
class Flavour:
    """A library of the TensorRT family.

    Attributes:
        backend: name of qdeploy's backend, as in ``--backend``.
        title: name of the library in messages.
        module: import name of its Python bindings.
        oldest: oldest version that is supported.
        int8_convolutions: oldest version whose convolutions multiply int8.
        install: the command that installs it.
        cuda: major version of CUDA by the package of its libraries.
        targets: compute capabilities, as ``89``, that it compiles for without a GPU; empty where it builds for the
            GPU of the machine alone.
        default_targets: those that are built for where nothing is said and no GPU is there.
        rewrites: whether graphs are brought into the form that its compiler, Myelin, fuses best
            (`qdeploy.engines.tensorrt.adapted`).
        wide_scales: whether Q/DQ scales stay float32 between 16-bit tensors: it converts them back in any case.
        default_precision: type of what is not quantized, where nothing is said.
    """

    backend: str
    title: str
    module: str
    oldest: tuple[int, ...]
    install: str
    cuda: Mapping[str, int]
    int8_convolutions: tuple[int, ...] = (0,)
    targets: tuple[int, ...] = ()
    default_targets: tuple[int, ...] = ()
    rewrites: bool = False
    wide_scales: bool = False
    default_precision: str = "f32"


TENSORRT = Flavour(
    backend="tensorrt",
    title="TensorRT",
    module="tensorrt",
    oldest=(10, 8),
    install="pip install 'qdeploy[tensorrt]'",
    cuda=TENSORRT_PACKAGES,
)
# SM75 is not in the default set: with it, int8 convolutions of every other target run in 16 bits.
RTX = Flavour(
    backend="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    oldest=(1, 5),
    int8_convolutions=(1, 7),
    install="pip install 'qdeploy[rtx]'",
    cuda={"tensorrt_rtx_cu13_libs": 13, "tensorrt_rtx_cu12_libs": 12},
    targets=(75, 80, 86, 89, 120, 121),
    default_targets=(86, 89, 120),
    rewrites=True,
    wide_scales=True,
    default_precision="f16",
)
# Targets whose quantized graphs they read: symmetric, in ONNX's own operators.
DIALECTS = frozenset({"portable", "tensorrt"})
FLAVOURS = {flavour.backend: flavour for flavour in (TENSORRT, RTX)}
