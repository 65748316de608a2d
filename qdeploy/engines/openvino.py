"""OpenVINO on CPUs: the IR that diffusers' OpenVINO pipelines open, int8 kernels where Q/DQ allow them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import Engine, Kernel, why
from qdeploy.engines.blobs import LARGEST_BYTES, Blobs
from qdeploy.engines.component import EngineComponent
from qdeploy.engines.openvino_graph import MODEL, build, build_component
from qdeploy.engines.openvino_shapes import DEVICES, ShapedModel, shared
from qdeploy.engines.openvino_timestep import take_fractional_timesteps
from qdeploy.engines.registry import Backend
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError
from qdeploy.system.machine import WIDE, has_bf16, int8_sums_saturate
from qdeploy.system.telemetry import import_silently

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec

# Suffixes that OpenVINO's importer and transformations append to the name of an ONNX node.
_ENDINGS = re.compile(r"(/WithoutBiases|/DequantizationMultiply|/fused_weights|_original)+$")
# A product in the middle of what OpenVINO fuses to one kernel: attention's.
_PRODUCT = re.compile(r"/MatMul/\d+$")


class OpenVINOEngine(Engine):
    """An IR on OpenVINO's CPU plugin, compiled for each new set of input shapes.

    Any number of threads may call it at the same time.

    Args:
        spec: the engine's files, and how they are to be run.
        threads: number of threads; OpenVINO's own choice if None.

    Raises:
        CapabilityError: the engine is a bf16 one and this processor has no bf16; or its int8 sums would
            overflow here.
        InvalidInputError: OpenVINO cannot read the model.
    """

    backend = "openvino"

    def __init__(self, spec: EngineSpec, threads: int | None = None) -> None:
        openvino = import_silently("openvino")

        super().__init__(spec)
        if self.precision == "bf16" and not has_bf16():
            raise CapabilityError(f"{self.path} needs bf16, which this processor lacks: build it with f32")
        if spec.int8_sums == WIDE and int8_sums_saturate():
            raise CapabilityError(
                f"{self.path} has 8-bit weights whose sums overflow on this processor, which has no VNNI: "
                "build it again here, or calibrate with int7 weights"
            )
        core = openvino.Core()
        target = spec.device or "CPU"
        require_device(core, target)
        try:
            model = core.read_model(spec.component_folder / MODEL)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"OpenVINO cannot read {self.path}: {why(error)}") from error
        take_fractional_timesteps(model)
        # A model whose files have no hashes yet is being built, and measured as it was compiled.
        hashes = spec.files.items()
        files = {name: digest for name, digest in hashes if name.startswith(f"{self.component}/openvino")}
        weights = spec.component_folder / MODEL.replace(".xml", ".bin")
        small = weights.is_file() and weights.stat().st_size <= LARGEST_BYTES
        options = compile_options(self.precision, threads, spec.dynamic_group or 0)
        blobs = Blobs(files, f"openvino {openvino.__version__}") if files and small else None
        self.shaped = ShapedModel(core, model, self.path, options, blobs, target)
        self.ports = self.shaped.ports

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        (output,) = self.shaped(inputs)
        return output

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        found = self.shaped.at(inputs)
        compiled = found.model
        # A compiled model that was kept from an earlier process has lost the names of layers that were fused.
        if calls or found.imported:
            compiled = self.shaped.compile_for(inputs, **({"PERF_COUNT": "YES"} if calls else {}))
        executed = compiled.get_runtime_model()
        kernels = [kernel for op in executed.get_ordered_ops() if (kernel := kernel_of(op)) is not None]
        times = _kernel_times(compiled, inputs, calls) if calls else {}
        return [replace(kernel, ms=times.get(kernel.name)) for kernel in kernels]

    def close(self) -> None:
        self.shaped.close()


class OpenVINOComponent(EngineComponent):
    """An IR of a pipeline's text encoder or autoencoder.

    Args:
        folder: holds the IR.
        precision: what it computes in, ``f32`` or ``bf16``.
        threads: number of threads; OpenVINO's own choice if None.

    Raises:
        CapabilityError: it is to compute in bf16, and this processor has none.
        InvalidInputError: OpenVINO cannot read the model.
    """

    def __init__(self, folder: Path, precision: str = "f32", threads: int | None = None) -> None:
        openvino = import_silently("openvino")

        super().__init__(folder)
        if precision == "bf16" and not has_bf16():
            raise CapabilityError(f"{folder} needs bf16, which this processor lacks: build it with f32")
        core = openvino.Core()
        try:
            model = core.read_model(folder / MODEL)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"OpenVINO cannot read {folder}: {why(error)}") from error
        self.shaped = ShapedModel(core, model, folder, compile_options(precision, threads))
        self.ports, self.outputs = self.shaped.ports, self.shaped.outputs

    def _run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        return self.shaped(inputs)


def compile_options(precision: str, threads: int | None, dynamic_group: int = 0) -> dict[str, Any]:
    """What OpenVINO compiles with: shortest latency, and no rounding that nobody simulated.

    Args:
        precision: of what is not integer.
        threads: number of threads; OpenVINO's own choice if None.
        dynamic_group: features of an input that are rounded to int8 with one scale, call by call, in front of
            weights in blocks; 0 for none. Left to itself the plugin may round float activations so.
    """
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(dynamic_group),
    }
    return options if threads is None else options | {"INFERENCE_NUM_THREADS": threads}


def require_device(core: Any, device: str) -> None:
    """Make sure that OpenVINO finds a device on this machine.

    Raises:
        UsageError: OpenVINO engines run on no device of that name.
        CapabilityError: there is none here.
    """
    if device not in DEVICES:
        raise UsageError(f"OpenVINO's engines run on {', '.join(DEVICES)}, not on {device!r}")
    found = {name.partition(".")[0] for name in core.available_devices}
    if device not in found:
        raise CapabilityError(
            f"OpenVINO finds no {device} on this machine, only {', '.join(sorted(found)) or 'nothing'}: install "
            "its driver, or build with --device CPU"
        )


def _kernel_times(compiled: Any, inputs: dict[str, Tensor], calls: int) -> dict[str, float]:
    """Median times in ms by kernel, of a compiled model that keeps counters."""
    request = compiled.create_infer_request()
    for name, x in inputs.items():
        request.set_tensor(name, shared(x))
    times: dict[str, list[float]] = {}
    for call in range(calls + 1):
        request.infer()
        for entry in request.get_profiling_info() if call else ():  # the first call is slower
            times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
    return {name: round(median(values), 6) for name, values in times.items()}


def kernel_of(op: Any) -> Kernel | None:
    """The plugin's report of one executed operation; None for constants, inputs and outputs."""
    info = op.get_rt_info()

    def read(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    kind, implementation = read("layerType"), read("primitiveType")
    if kind in ("Const", "Input", "Output"):
        return None
    # runtimePrecision is that of the first input; the implementation's name contains the type of the arithmetic.
    precision = implementation.rpartition("_")[2].lower() or read("runtimePrecision").lower()
    names = [_ENDINGS.sub("", name) for name in read("originalLayersNames").split(",") if name]
    if kind == "Subgraph" and (fused := [name for name in names if _PRODUCT.search(name)]):
        # In int8 the first product of an attention has the name of the scaling that follows it.
        names += [_PRODUCT.sub("/MatMul/0", name) for name in fused]
        kind = "Attention"
    return Kernel(
        name=str(op.get_friendly_name()),
        layers=tuple(dict.fromkeys(names)),
        kind=kind,
        precision="int8" if precision in ("i8", "u8") else precision,
        type=implementation,
    )


BACKEND = Backend(
    name="openvino",
    description="OpenVINO on CPUs: int8 (weights of 7 bits at most without VNNI), everything else in f32 or bf16",
    package="openvino",
    install="openvino",
    build=build,
    load=OpenVINOEngine,
    rank=10,
    lacks=frozenset({"fp8", "nvfp4"}),
    narrow_sums=True,
    build_options=("device",),
    any_size=True,
    build_component=build_component,
    load_component=OpenVINOComponent,
    rewrites_autoencoders=True,
)
