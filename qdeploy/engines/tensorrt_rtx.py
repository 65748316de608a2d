"""TensorRT for RTX: NVIDIA's builder for GeForce and RTX GPUs, which needs no GPU to build.

The engine is compiled ahead of time for the GPUs that ``--gpu`` names; the kernels are chosen on the GPU, when it is
first loaded, and kept in a cache.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines.registry import Backend
from qdeploy.engines.tensorrt.flavour import DIALECTS, RTX
from qdeploy.engines.tensorrt.options import LIMITS, PRECISIONS, RTX_BUILD_OPTIONS
from qdeploy.system.gpu import require_gpu

if TYPE_CHECKING:
    from qdeploy.engines.base import Engine
    from qdeploy.engines.spec import EngineSpec


def build(onnx_path: Path, folder: Path, **build_options: Any) -> dict[str, Any]:
    """Write the plan of a graph; see `qdeploy.engines.tensorrt.builder`."""
    from qdeploy.engines.tensorrt.builder import build

    return build(onnx_path, folder, flavour=RTX, **build_options)


def load(spec: EngineSpec, threads: int | None = None) -> Engine:
    """The engine of a verified folder."""
    from qdeploy.engines.tensorrt.engine import TensorRTRTXEngine

    return TensorRTRTXEngine(spec, threads)


BACKEND = Backend(
    name=RTX.backend,
    description="TensorRT for RTX on GeForce and RTX GPUs: int8, fp8, int4 and fp4; engines are built on any machine",
    package=RTX.module,
    install="'qdeploy[rtx]'",
    dialects=DIALECTS,
    build=build,
    load=load,
    precisions=PRECISIONS,
    default_precision=RTX.default_precision,
    rank=15,
    device="cuda",
    build_options=RTX_BUILD_OPTIONS,
    limits=LIMITS,
    can_run=partial(require_gpu, packages=RTX.cuda),
)
