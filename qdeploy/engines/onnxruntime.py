"""ONNX Runtime on CPUs: the oracle that engines are compared with, and a portable fallback.

Its kernels compute a convolution in int8 only when the output is quantized too. With Q/DQ on inputs alone, as in
the portable dialect, it computes in float what the calibration simulated, number for number. The dialect of
the target ``onnxruntime`` computes the same in integers (`qdeploy.export.passes.gathered_convolutions`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import DYNAMIC, Engine, Kernel, Port, why
from qdeploy.engines.component import EngineComponent
from qdeploy.engines.registry import Backend
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.machine import int8_sums_saturate
from qdeploy.system.memory import give_back_freed

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec

MODEL = "model.onnx"
WEIGHTS = "model.onnx_data"

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_INT8_OPS = {
    "QLinearConv", "ConvInteger", "ConvIntegerToFloat", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul", "QAttention",
}  # fmt: skip
# Suffixes that graph optimizations append to the name of a node.
_ENDINGS = re.compile(r"(/MatMulAddFusion|_token_\d+)+/?$")


class ONNXRuntimeEngine(Engine):
    """A graph on ONNX Runtime's CPU provider.

    Args:
        spec: the engine's files, and how they are to be run.
        threads: number of threads; ONNX Runtime's own choice if None.

    Raises:
        InvalidInputError: ONNX Runtime cannot load the graph.
    """

    backend = "onnxruntime"
    # Execution providers, or names with their options, the preferred one first.
    providers: Sequence[Any] = ("CPUExecutionProvider",)

    def __init__(self, spec: EngineSpec, threads: int | None = None) -> None:
        from qdeploy.export.graph.external import check_external

        super().__init__(spec)
        self._file = spec.component_folder / MODEL
        self._threads = threads
        # Merging MatMul with the bias's Add into Gemm would separate it from its Q/DQ, and so from int8.
        self._disabled = ["MatMulAddFusion"] if spec.activations != "none" else []
        check_external(self._file)
        self._session = self._load(self._session_options())
        give_back_freed()  # the file, as protobuf held it while it was read: as much as the weights
        self.ports = ports_of(self._session)

    def _session_options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Signed activations stay signed: rewriting them to unsigned breaks some graphs (1.31).
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        # In front of weights in blocks: 1 for products of floats, 4 for inputs rounded to int8, call by call.
        level = "4" if self.spec.activations == DYNAMIC else "1"
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        if self.spec.target == "onnxruntime" and int8_sums_saturate():
            # This makes the signed weights behind unsigned activations unsigned too, which is slower and right.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self.spec.weights == "fp8":
            # Else Q/DQ around a product becomes an integer kernel, which takes no fp8 (1.31).
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options

    def _load(self, options: Any) -> Any:
        import onnxruntime

        try:
            return onnxruntime.InferenceSession(
                str(self._file),
                options,
                providers=list(self.providers),
                disabled_optimizers=self._disabled,
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base class but Exception
            raise InvalidInputError(f"ONNX Runtime cannot load {self.path}: {why(error)}") from error

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._infer(self._session, inputs)

    def _infer(self, session: Any, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        try:
            (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        except Exception as error:
            raise InvalidInputError(f"ONNX Runtime cannot run {self.path}: {why(error)}") from error
        return torch.from_numpy(output)

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        with tempfile.TemporaryDirectory() as folder:
            options = self._session_options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._load(options)
            for _ in range(calls + 1):  # the first one is slower, and not timed
                self._infer(session, inputs)
            events = json.loads(Path(session.end_profiling()).read_text())
        by_node: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if "op_name" in event.get("args", {}):
                by_node.setdefault(event["name"], []).append(event)
        return [_kernel(same) for same in by_node.values()]


def _kernel(events: Sequence[dict[str, Any]]) -> Kernel:
    """One executed node, from the profile's entries for each of its calls."""
    event, times = events[0], [other["dur"] / 1e3 for other in events[1:]]
    name = str(event["name"]).removesuffix("_kernel_time")
    kind = str(event["args"]["op_name"])
    inputs = [next(iter(shaped)) for shaped in event["args"].get("input_type_shape", [])]
    precision = "int8" if kind in _INT8_OPS else {"float": "f32"}.get(inputs[0], inputs[0]) if inputs else ""
    layer = _ENDINGS.sub("", name)
    return Kernel(name, (layer,), kind, precision, kind, round(median(times), 6) if times else None)


class ONNXRuntimeComponent(EngineComponent):
    """A graph of a pipeline's text encoder or autoencoder.

    Args:
        folder: holds the graph.
        precision: ``f32``.
        threads: number of threads; ONNX Runtime's own choice if None.

    Raises:
        InvalidInputError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, folder: Path, precision: str = "f32", threads: int | None = None) -> None:
        import onnxruntime

        super().__init__(folder)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base class but Exception
            raise InvalidInputError(f"ONNX Runtime cannot load {folder}: {why(error)}") from error
        give_back_freed()
        self.ports = ports_of(self._session)
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def _run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        import torch

        try:
            results = self._session.run(None, {name: x.numpy() for name, x in inputs.items()})
        except Exception as error:
            raise InvalidInputError(f"ONNX Runtime cannot run {self.folder}: {why(error)}") from error
        return [torch.from_numpy(result) for result in results]


def ports_of(session: Any) -> dict[str, Port]:
    """The inputs of a session by name."""
    return {
        port.name: Port(_DTYPES[port.type], tuple(d if isinstance(d, int) else None for d in port.shape))
        for port in session.get_inputs()
    }


def build_component(onnx_path: Path, folder: Path, precision: str) -> None:
    """Copy the graph of a text encoder or an autoencoder.

    Raises:
        InvalidInputError: ONNX Runtime cannot load it.
    """
    build(onnx_path, folder)


def build(onnx_path: Path, folder: Path) -> None:
    """Copy the graph and its weights; ONNX Runtime optimizes it when it loads it.

    Raises:
        InvalidInputError: ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, WEIGHTS):
        if (onnx_path.parent / name).is_file():
            shutil.copyfile(onnx_path.parent / name, folder / name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidInputError(
            f"ONNX Runtime cannot take {onnx_path.parent.name}/{onnx_path.name}: {why(error)}"
        ) from error


BACKEND = Backend(
    name="onnxruntime",
    description="ONNX Runtime on CPUs: computes what was calibrated, in int8 for --target onnxruntime",
    package="onnxruntime",
    install="onnxruntime",
    lacks=frozenset({"nvfp4"}),
    build=build,
    load=ONNXRuntimeEngine,
    precisions=("f32",),
    rank=0,
    any_size=True,
    build_component=build_component,
    load_component=ONNXRuntimeComponent,
)
