"""TensorRT on NVIDIA GPUs: int8 convolutions and GEMMs, everything else in f32, f16 or bf16.

The builder runs on NVIDIA's own library for RTX GPUs, which needs none; the runtime was written against TensorRT
11.4's real Python bindings and executed through them over a recording stand-in for the library.
``docs/tensorrt.md`` tells what has not run on hardware yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines.registry import Backend
from qdeploy.engines.tensorrt.flavour import DIALECTS
from qdeploy.engines.tensorrt.options import BUILD_OPTIONS, LIMITS, PRECISIONS
from qdeploy.system.gpu import require_gpu

if TYPE_CHECKING:
    from qdeploy.engines.base import Engine
    from qdeploy.engines.spec import EngineSpec


def build(onnx_path: Path, folder: Path, **build_options: Any) -> dict[str, Any]:
    """Write the plan of a graph; see `qdeploy.engines.tensorrt.builder`."""
    from qdeploy.engines.tensorrt.builder import build

    return build(onnx_path, folder, **build_options)


def load(spec: EngineSpec, threads: int | None = None) -> Engine:
    """The engine of a verified folder."""
    from qdeploy.engines.tensorrt.engine import TensorRTEngine

    return TensorRTEngine(spec, threads)


def _check() -> None:
    require_gpu()


BACKEND = Backend(
    name="tensorrt",
    description="TensorRT on NVIDIA GPUs: int8 tensor cores, everything else in f32, f16 or bf16",
    package="tensorrt",
    install="'qdeploy[tensorrt]'",
    dialects=DIALECTS,
    build=build,
    load=load,
    precisions=PRECISIONS,
    rank=20,
    device="cuda",
    build_options=BUILD_OPTIONS,
    limits=LIMITS,
    check=_check,
)
