"""TensorRT for RTX inside ONNX Runtime: NVIDIA's plugin for the plain package onnxruntime.

The plugin is a package of its own, ``onnxruntime-ep-nv-tensorrt-rtx-cu13``, which is registered with the ONNX Runtime
that is installed and overwrites none of its files. It compiles the graph on the GPU when a session begins, and keeps
what it compiled in a cache. Whatever the plugin does not take makes the session fail: ONNX Runtime would otherwise
compute it, or everything, on the processor without a word.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines import onnxruntime as plain
from qdeploy.engines.base import UNKNOWN, Kernel, why
from qdeploy.engines.onnxruntime_tensorrt import PROFILE, kept_kernels, one_profile
from qdeploy.engines.registry import Backend
from qdeploy.engines.tensorrt.adapted import adapted
from qdeploy.engines.tensorrt.flavour import DIALECTS, RTX
from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.gpu import require_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
# The plugin's libraries are made for CUDA 13.
CUDA = {"onnxruntime_ep_nv_tensorrt_rtx_cu13": 13}
NO_FALLBACK = "session.disable_cpu_ep_fallback"


def provider_options(profile: dict[str, str], cache: Path) -> dict[str, str]:
    """Options of the plugin.

    Args:
        profile: shapes as strings, by ``min``, ``opt`` and ``max``.
        cache: folder where compiled kernels are kept.
    """
    shapes = {f"nv_profile_{which}_shapes": text for which, text in profile.items() if text}
    return {"nv_runtime_cache_path": str(cache)} | shapes


class ONNXRuntimeTensorRTRTXEngine(plain.ONNXRuntimeEngine):
    """A graph on NVIDIA's plugin for ONNX Runtime, inputs and outputs in the machine's memory.

    Args:
        spec: the engine's files, and how they are to be run.
        threads: of ONNX Runtime's own work.

    Raises:
        CapabilityError: no GPU, no plugin, or none of its devices.
        InvalidInputError: the plugin cannot run the whole graph.
    """

    backend = "onnxruntime-tensorrt-rtx"

    def __init__(self, spec: EngineSpec, threads: int | None = None) -> None:
        require()
        self._cache = kept_kernels(self.backend, spec.component_folder)
        self._profile: dict[str, str] = json.loads((spec.component_folder / PROFILE).read_text())
        super().__init__(spec, threads)

    def _load(self, options: Any) -> Any:
        import onnxruntime

        options.add_session_config_entry(NO_FALLBACK, "1")
        options.add_provider_for_devices(devices()[:1], provider_options(self._profile, self._cache))
        try:
            return onnxruntime.InferenceSession(str(self._file), options)
        except Exception as error:  # ONNX Runtime's exceptions have no base class but Exception
            raise InvalidInputError(
                f"TensorRT for RTX cannot run all of {self.path}: {why(error)}"
            ) from error

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        """Nodes of the profile; the part that the plugin runs is one node without details."""
        return [replace(kernel, precision=UNKNOWN) for kernel in super()._kernels(inputs, calls)]


def build(
    onnx_path: Path, folder: Path, *, precision: str = "f16", batch: int = 1, shapes: str | None = None
) -> None:
    """Write the graph in its precision and in the form that the library fuses best, and the shapes to compile for.

    Raises:
        UsageError: the shapes do not fit the graph, or are several profiles.
        InvalidInputError: the graph cannot be read.
    """
    import onnx_ir as ir

    from qdeploy.engines.tensorrt.half import halve

    profile = one_profile(ONNXRuntimeTensorRTRTXEngine.backend, onnx_path, batch, shapes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = adapted(RTX, onnx_path, Path(scratch), precision)
        if precision == "f32":
            ir.save(ir.load(path), folder / plain.MODEL, external_data=plain.WEIGHTS)
        else:
            halve(path, folder / plain.MODEL, precision)
    (folder / PROFILE).write_text(json.dumps(profile))


def require() -> None:
    """Check that there is a GPU, and an ONNX Runtime that takes plugins.

    Raises:
        CapabilityError: one of them is missing.
    """
    require_gpu(packages=CUDA)
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise CapabilityError(
            f"ONNX Runtime {onnxruntime.__version__} takes no plugins: pip install 'onnxruntime>=1.24'"
        )


def devices() -> list[Any]:
    """The devices that the plugin offers; it is registered with ONNX Runtime once.

    Raises:
        CapabilityError: the plugin cannot be loaded, or finds no GPU that it supports.
    """
    import onnxruntime

    found = _of_plugin(onnxruntime)
    if not found:
        try:
            plugin = import_module(PACKAGE)
            onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:  # a missing package, and ONNX Runtime's exceptions
            raise CapabilityError(f"ONNX Runtime cannot load NVIDIA's plugin: {why(error)}") from error
        found = _of_plugin(onnxruntime)
    if not found:
        raise CapabilityError(
            "NVIDIA's plugin for ONNX Runtime finds no GPU that it supports: it needs an RTX GPU of SM86 or newer"
        )
    return found


def _of_plugin(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


BACKEND = Backend(
    name="onnxruntime-tensorrt-rtx",
    description="TensorRT for RTX as a plugin of ONNX Runtime, on RTX GPUs; nothing falls back to the CPU",
    package=PACKAGE,
    install="'qdeploy[onnxruntime-rtx]'",
    lacks=frozenset({"nvfp4"}),
    dialects=DIALECTS,
    build=build,
    load=ONNXRuntimeTensorRTRTXEngine,
    precisions=("f16", "bf16", "f32"),
    default_precision=RTX.default_precision,
    rank=0,
    device="cuda",
    build_options=("shapes",),
    check=require,
)
