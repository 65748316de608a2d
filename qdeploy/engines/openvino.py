"""OpenVINO on CPUs: the IR that diffusers' OpenVINO pipelines open, int8 kernels where Q/DQ allow them."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from io import BytesIO
from statistics import median
from threading import RLock
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import Engine, Kernel, Port, why
from qdeploy.engines.blobs import LARGEST_BYTES, Blobs
from qdeploy.engines.openvino_graph import MODEL, build
from qdeploy.engines.pool import Pool
from qdeploy.engines.registry import Backend
from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.machine import WIDE, has_bf16, int8_sums_saturate
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec

# Compiled models that are kept, one per set of input shapes. Each holds its own packed weights.
KEPT_SHAPES = 4

_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}
# Suffixes that OpenVINO's importer and transformations append to the name of an ONNX node.
_ENDINGS = re.compile(r"(/WithoutBiases|/DequantizationMultiply|/fused_weights|_original)+$")
# A product in the middle of what OpenVINO fuses to one kernel: attention's.
_PRODUCT = re.compile(r"/MatMul/\d+$")


@dataclass(frozen=True)
class _Compiled:
    """The model compiled for one set of input shapes.

    Attributes:
        model: OpenVINO's compiled model.
        imported: whether an earlier process compiled it.
        shape: of the output.
        requests: inference requests, one for each thread that calls at the same time.
    """

    model: Any
    imported: bool
    shape: tuple[int, ...]
    requests: Pool[Any]


class OpenVINOEngine(Engine):
    """An IR on OpenVINO's CPU plugin, compiled for each new set of input shapes.

    Shapes are fixed before compiling: static kernels are faster, and the plugin can plan memory in advance. Any
    number of threads may call it at the same time.

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
        import openvino

        super().__init__(spec)
        if self.precision == "bf16" and not has_bf16():
            raise CapabilityError(f"{self.path} needs bf16, which this processor lacks: build it with f32")
        if spec.int8_sums == WIDE and int8_sums_saturate():
            raise CapabilityError(
                f"{self.path} has 8-bit weights whose sums overflow on this processor, which has no VNNI: "
                "build it again here, or calibrate with int7 weights"
            )
        self._core = openvino.Core()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            # Features of an input that are rounded to int8 with one scale, call by call, in front of weights in
            # blocks. Otherwise the plugin may quantize float activations on its own, which nobody simulated.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(spec.dynamic_group or 0),
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = self._core.read_model(spec.component_folder / MODEL)
        except RuntimeError as error:
            raise InvalidInputError(f"OpenVINO cannot read {self.path}: {why(error)}") from error
        self.ports = {}
        for port in self._model.inputs:
            dims = port.partial_shape
            shape = tuple(None if dim.is_dynamic else dim.get_length() for dim in dims)
            self.ports[port.any_name] = Port(_DTYPES[port.element_type.get_type_name()], shape)
        # A model whose files have no hashes yet is being built, and measured as it was compiled.
        hashes = spec.files.items()
        files = {name: digest for name, digest in hashes if name.endswith((".xml", ".bin"))}
        weights = spec.component_folder / MODEL.replace(".xml", ".bin")
        small = weights.is_file() and weights.stat().st_size <= LARGEST_BYTES
        self._blobs = Blobs(files, f"openvino {openvino.__version__}") if files and small else None
        # One thread at a time compiles; each runs inference requests of its own.
        self._lock = RLock()
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], _Compiled] = OrderedDict()

    def _for(self, inputs: dict[str, Tensor]) -> _Compiled:
        """The model for the shapes of these inputs, compiled when they are first seen."""
        key = tuple(tuple(inputs[name].shape) for name in self.ports)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            model, imported = self._kept(inputs)
            shape = tuple(model.output(0).shape)
            self._compiled[key] = _Compiled(model, imported, shape, Pool(model.create_infer_request))
            if len(self._compiled) > KEPT_SHAPES:
                self._compiled.popitem(last=False)
            return self._compiled[key]

    def _kept(self, inputs: dict[str, Tensor]) -> tuple[Any, bool]:
        """The compiled model from an earlier process, else compiled now and kept for the next; and which it is."""
        if self._blobs is None:
            return self.compile_for(inputs), False
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        request = {"shapes": shapes, "options": self._options}
        blob = self._blobs.read(request)
        if blob is not None:
            try:
                return self._core.import_model(BytesIO(blob), "CPU", self._options), True
            except RuntimeError:
                say(f"OpenVINO cannot load its compiled model of {self.path}: compiling it again")
                self._blobs.drop(request)
        compiled, stream = self.compile_for(inputs), BytesIO()
        compiled.export_model(stream)
        self._blobs.write(request, stream.getvalue())
        return compiled, False

    def compile_for(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The model, compiled for the shapes of these inputs."""
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        try:
            self._model.reshape(shapes)
            return self._core.compile_model(self._model, "CPU", {**self._options, **options})
        except RuntimeError as error:
            raise InvalidInputError(f"OpenVINO cannot run {self.path} at {shapes}: {why(error)}") from error

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        compiled = self._for(inputs)
        output = torch.empty(compiled.shape, dtype=torch.float32)
        with compiled.requests.take() as request:
            # Both sides read and write the same memory; nothing is copied.
            for name, x in inputs.items():
                request.set_tensor(name, _shared(x))
            request.set_output_tensor(0, _shared(output))
            request.infer()
        return output

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        found = self._for(inputs)
        compiled = found.model
        # A compiled model that was kept from an earlier process has lost the names of layers that were fused.
        if calls or found.imported:
            with self._lock:
                compiled = self.compile_for(inputs, **({"PERF_COUNT": "YES"} if calls else {}))
        executed = compiled.get_runtime_model()
        kernels = [kernel for op in executed.get_ordered_ops() if (kernel := kernel_of(op)) is not None]
        times = _kernel_times(compiled, inputs, calls) if calls else {}
        return [replace(kernel, ms=times.get(kernel.name)) for kernel in kernels]

    def close(self) -> None:
        with self._lock:
            self._compiled.clear()


def _kernel_times(compiled: Any, inputs: dict[str, Tensor], calls: int) -> dict[str, float]:
    """Median times in ms by kernel, of a compiled model that keeps counters."""
    request = compiled.create_infer_request()
    for name, x in inputs.items():
        request.set_tensor(name, _shared(x))
    times: dict[str, list[float]] = {}
    for call in range(calls + 1):
        request.infer()
        for entry in request.get_profiling_info() if call else ():  # the first call is slower
            times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
    return {name: round(median(values), 6) for name, values in times.items()}


def _shared(x: Tensor) -> Any:
    """A tensor as OpenVINO's, in the same memory."""
    import openvino

    return openvino.Tensor(x.numpy(), shared_memory=True)


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
    lacks=frozenset({"fp8"}),
    narrow_sums=True,
)
