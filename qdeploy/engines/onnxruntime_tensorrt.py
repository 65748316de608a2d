"""TensorRT inside ONNX Runtime: a second way to the same kernels, by the package onnxruntime-gpu.

ONNX Runtime passes the graph to TensorRT, which builds at the first call and keeps the plan in a cache. What
TensorRT does not take runs on the CUDA provider, which has no int8 convolution and computes it in float. Which
kernels run inside TensorRT is not visible here; the backend ``tensorrt`` reports them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines import onnxruntime as plain
from qdeploy.engines.base import UNKNOWN, Kernel
from qdeploy.engines.registry import Backend
from qdeploy.engines.tensorrt.flavour import DIALECTS
from qdeploy.engines.tensorrt.graph import read_graph
from qdeploy.engines.tensorrt.profiles import Profile, check_profiles, default_profile, parse_shapes
from qdeploy.store.paths import cache_folder
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.gpu import find_gpu, require_gpu
from qdeploy.system.hashing import sha256_files

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec

PROVIDER = "TensorrtExecutionProvider"
PROFILE = "profile.json"


def provider_options(profile: dict[str, str], cache: Path) -> dict[str, Any]:
    """Options of the TensorRT provider.

    Args:
        profile: shapes as strings, by ``min``, ``opt`` and ``max``.
        cache: folder where plans and timings are kept.
    """
    options: dict[str, Any] = {
        # Needed before TensorRT 11 where the graph has Q/DQ; ignored where types come from the graph alone.
        "trt_int8_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
    }
    return options | {f"trt_profile_{which}_shapes": shapes for which, shapes in profile.items() if shapes}


def profile_strings(profile: Profile) -> dict[str, str]:
    """A profile in the provider's form: one string for each of ``min``, ``opt`` and ``max``."""

    def join(which: str) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, getattr(r, which)))}" for name, r in profile.items())

    return {"min": join("least"), "opt": join("tuned"), "max": join("largest")}


def kept_kernels(backend: str, folder: Path, suffix: str = "") -> Path:
    """The cache folder of what a backend compiles of a graph, which an artifact's own folder must not hold.

    Args:
        backend: its name.
        folder: of the graph.
        suffix: what else it belongs to, such as the GPU.
    """
    parts = {name: folder / name for name in (plain.MODEL, plain.WEIGHTS) if (folder / name).is_file()}
    cache = cache_folder() / backend / f"{sha256_files(parts)[:32]}{suffix}"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def one_profile(backend: str, graph: Path, batch: int, shapes: str | None) -> dict[str, str]:
    """The shapes that a graph is compiled for, in the provider's form.

    Args:
        backend: its name, for messages.
        graph: the ONNX file.
        batch: the number of samples to tune for, where no shapes are given.
        shapes: as ``--shapes`` has them.

    Raises:
        UsageError: they do not fit the graph, or are several profiles.
        InvalidInputError: the graph cannot be read.
    """
    inputs = read_graph(graph).inputs
    profiles = [default_profile(inputs, batch)] if shapes is None else parse_shapes(shapes)
    if len(profiles) != 1:
        raise UsageError(f"{backend} takes one profile: leave out | in --shapes")
    check_profiles(profiles, inputs)
    return profile_strings(profiles[0])


class ONNXRuntimeTensorRTEngine(plain.ONNXRuntimeEngine):
    """A graph on ONNX Runtime's TensorRT provider, inputs and outputs in the machine's memory.

    Args:
        spec: the engine's files, and how they are to be run.
        threads: of what stays on the processor.
    """

    backend = "onnxruntime-tensorrt"

    def __init__(self, spec: EngineSpec, threads: int | None = None) -> None:
        require()
        profile = json.loads((spec.component_folder / PROFILE).read_text())
        cache = kept_kernels(self.backend, spec.component_folder, f"-sm{find_gpu().sm}")
        self.providers = (
            (PROVIDER, provider_options(profile, cache)),
            "CUDAExecutionProvider",
            *self.providers,
        )
        super().__init__(spec, threads)

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        """Nodes of the profile; the part that TensorRT runs is one node without details."""
        return [
            replace(k, precision=UNKNOWN) if k.kind.startswith("TRTKernel") else k
            for k in super()._kernels(inputs, calls)
        ]


def build(
    onnx_path: Path, folder: Path, *, precision: str = "f32", batch: int = 1, shapes: str | None = None
) -> None:
    """Write the graph in its precision, and the shapes that TensorRT tunes for.

    Raises:
        UsageError: the shapes do not fit the graph, or are several profiles.
        InvalidInputError: the graph cannot be read.
    """
    from qdeploy.engines.tensorrt.half import halve

    profile = one_profile(ONNXRuntimeTensorRTEngine.backend, onnx_path, batch, shapes)
    folder.mkdir(parents=True, exist_ok=True)
    if precision == "f32":
        for name in (plain.MODEL, plain.WEIGHTS):
            if (onnx_path.parent / name).is_file():
                shutil.copyfile(onnx_path.parent / name, folder / name)
    else:
        halve(onnx_path, folder / plain.MODEL, precision)
    (folder / PROFILE).write_text(json.dumps(profile))


def require() -> None:
    """Check that there is a GPU and an ONNX Runtime with the provider.

    Raises:
        CapabilityError: one of them is missing.
    """
    require_gpu()
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise CapabilityError(
            "this ONNX Runtime has no TensorRT provider: pip uninstall onnxruntime, then pip install "
            "onnxruntime-gpu"
        )


BACKEND = Backend(
    name="onnxruntime-tensorrt",
    description="TensorRT inside ONNX Runtime; what it leaves runs on CUDA, where convolutions have no int8",
    package="onnxruntime",
    install="onnxruntime-gpu",
    lacks=frozenset({"nvfp4"}),
    dialects=DIALECTS,
    build=build,
    load=ONNXRuntimeTensorRTEngine,
    precisions=("f32", "f16"),
    rank=0,
    device="cuda",
    build_options=("shapes",),
    check=require,
)
