"""OpenVINO on CPUs: the IR that diffusers' OpenVINO pipelines open, int8 kernels where Q/DQ allow them."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from io import BytesIO
from math import inf, prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import Engine, Kernel, Port, why
from qdeploy.engines.blobs import LARGEST_BYTES, Blobs
from qdeploy.engines.registry import Backend
from qdeploy.errors import CapabilityError, InvalidInputError
from qdeploy.machine import WIDE, has_bf16, int8_sums_saturate
from qdeploy.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.artifact import Artifact

MODEL = "openvino_model.xml"
# Compiled models that are kept, one per set of input shapes. Each holds its own packed weights.
KEPT_SHAPES = 4

_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}
# Endings that OpenVINO's importer and its transformations put behind the name of an ONNX node.
_ENDINGS = re.compile(r"(/WithoutBiases|/DequantizationMultiply|/fused_weights|_original)+$")
# Operations whose output holds the same values as their input, only elsewhere.
_MOVES = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "StridedSlice", "Interpolate", "MaxPool",
    "Relu", "Clamp", "Pad", "Split", "VariadicSplit", "Convert",
}  # fmt: skip


class OpenVINOEngine(Engine):
    """An IR on OpenVINO's CPU plugin, compiled for the shapes it meets.

    Shapes are fixed before compiling: static kernels are faster, and the plugin can lay out memory ahead.

    Args:
        artifact: the engine's folder.
        threads: number of threads; OpenVINO's own choice if None.

    Raises:
        CapabilityError: the engine is a bf16 one and this processor has no bf16; or its int8 sums would
            overflow here.
        InvalidInputError: OpenVINO cannot read the model.
    """

    backend = "openvino"

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        import openvino

        super().__init__(artifact)
        if self.precision == "bf16" and not has_bf16():
            raise CapabilityError(f"{self.path} needs bf16, which this processor lacks: build it with f32")
        if self.facts.get("int8_sums") == WIDE and int8_sums_saturate():
            raise CapabilityError(
                f"{self.path} has 8-bit weights whose sums overflow on this processor, which has no VNNI: "
                "build it again here, or calibrate with int7 weights"
            )
        self._core = openvino.Core()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            # Otherwise the plugin may quantize float activations on its own, which nobody calibrated.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = self._core.read_model(artifact.file(f"{self.component}/{MODEL}"))
        except RuntimeError as error:
            raise InvalidInputError(f"OpenVINO cannot read {self.path}: {why(error)}") from error
        self.ports = {}
        for port in self._model.inputs:
            dims = port.partial_shape
            shape = tuple(None if dim.is_dynamic else dim.get_length() for dim in dims)
            self.ports[port.any_name] = Port(_DTYPES[port.element_type.get_type_name()], shape)
        # A model whose files have no hashes yet is being built, and measured as it was compiled.
        hashes = artifact.manifest.get("files", {}).items()
        files = {name: digest for name, digest in hashes if name.endswith((".xml", ".bin"))}
        weights = artifact.path / self.component / MODEL.replace(".xml", ".bin")
        small = weights.is_file() and weights.stat().st_size <= LARGEST_BYTES
        self._blobs = Blobs(files, f"openvino {openvino.__version__}") if files and small else None
        # Shapes whose model an earlier process compiled.
        self._imported: set[tuple[tuple[int, ...], ...]] = set()
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], tuple[Any, tuple[int, ...]]] = OrderedDict()

    def _request(self, inputs: dict[str, Tensor]) -> tuple[Any, tuple[int, ...]]:
        """The inference request for these shapes, compiled at first sight; and the output's shape."""
        key = tuple(tuple(inputs[name].shape) for name in self.ports)
        if key in self._requests:
            self._requests.move_to_end(key)
            return self._requests[key]
        compiled, imported = self._kept(inputs)
        (self._imported.add if imported else self._imported.discard)(key)
        self._requests[key] = compiled.create_infer_request(), tuple(compiled.output(0).shape)
        if len(self._requests) > KEPT_SHAPES:
            self._requests.popitem(last=False)
        return self._requests[key]

    def _kept(self, inputs: dict[str, Tensor]) -> tuple[Any, bool]:
        """The compiled model from an earlier process, else compiled now and kept for the next; and which it is."""
        if self._blobs is None:
            return self._compile(inputs), False
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        request = {"shapes": shapes, "options": self._options}
        blob = self._blobs.read(request)
        if blob is not None:
            try:
                return self._core.import_model(BytesIO(blob), "CPU", self._options), True
            except RuntimeError:
                say(f"OpenVINO does not take its own compiled model of {self.path}: compiling it again")
                self._blobs.drop(request)
        compiled, stream = self._compile(inputs), BytesIO()
        compiled.export_model(stream)
        self._blobs.write(request, stream.getvalue())
        return compiled, False

    def _compile(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The model, compiled for the shapes of these inputs."""
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        try:
            self._model.reshape(shapes)
            return self._core.compile_model(self._model, "CPU", {**self._options, **options})
        except RuntimeError as error:
            raise InvalidInputError(f"OpenVINO cannot run {self.path} at {shapes}: {why(error)}") from error

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        request, shape = self._request(inputs)
        output = torch.empty(shape, dtype=torch.float32)
        # Both sides read and write the same memory; nothing is copied.
        for name, x in inputs.items():
            request.set_tensor(name, _shared(x))
        request.set_output_tensor(0, _shared(output))
        request.infer()
        return output

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        compiled = self._request(inputs)[0].get_compiled_model()
        if calls:
            compiled = self._compile(inputs, PERF_COUNT="YES")
        elif tuple(tuple(inputs[name].shape) for name in self.ports) in self._imported:
            # A compiled model that was kept has lost the names of layers that were fused.
            compiled = self._compile(inputs)
        executed = compiled.get_runtime_model()
        kernels = [kernel for op in executed.get_ordered_ops() if (kernel := kernel_of(op)) is not None]
        times = _kernel_times(compiled, inputs, calls) if calls else {}
        return [replace(kernel, ms=times.get(kernel.name)) for kernel in kernels]

    def close(self) -> None:
        self._requests.clear()


def _kernel_times(compiled: Any, inputs: dict[str, Tensor], calls: int) -> dict[str, float]:
    """Median times in ms by kernel, of a compiled model that keeps counters."""
    request = compiled.create_infer_request()
    for name, x in inputs.items():
        request.set_tensor(name, _shared(x))
    times: dict[str, list[float]] = {}
    for call in range(calls + 1):
        request.infer()
        for told in request.get_profiling_info() if call else ():  # the first call is slower
            times.setdefault(told.node_name, []).append(told.real_time.total_seconds() * 1e3)
    return {name: round(median(values), 6) for name, values in times.items()}


def _shared(x: Tensor) -> Any:
    """A tensor as OpenVINO's, in the same memory."""
    import openvino

    return openvino.Tensor(x.numpy(), shared_memory=True)


def kernel_of(op: Any) -> Kernel | None:
    """What the plugin says of one operation of the executed graph; None for constants and ends."""
    told = op.get_rt_info()

    def tell(key: str) -> str:
        return str(told[key].astype(str)) if key in told else ""

    kind, implementation = tell("layerType"), tell("primitiveType")
    if kind in ("Const", "Input", "Output"):
        return None
    # runtimePrecision is that of the first input; the implementation's name tells the arithmetic.
    precision = implementation.rpartition("_")[2].lower() or tell("runtimePrecision").lower()
    names = [_ENDINGS.sub("", name) for name in tell("originalLayersNames").split(",") if name]
    return Kernel(
        name=str(op.get_friendly_name()),
        layers=tuple(dict.fromkeys(names)),
        kind=kind,
        precision="int8" if precision in ("i8", "u8") else precision,
        type=implementation,
    )


# -- building ----------------------------------------------------------------------------------------------


def build(onnx_path: Path, folder: Path) -> None:
    """Convert a graph to IR: ``openvino_model.xml`` and ``.bin``, equal bytes for equal graphs.

    Raises:
        InvalidInputError: OpenVINO has no rule for one of the operations, or cannot read the graph.
    """
    import openvino

    try:
        with TemporaryDirectory() as scratch:
            model = openvino.Core().read_model(_adapted(onnx_path, Path(scratch)))
    except RuntimeError as error:
        # Operations without a rule come before the operations that fail because of them.
        lacking = re.search("No conversion rule found for operations: .+", str(error))
        reason = lacking[0] if lacking else why(error)
        raise InvalidInputError(
            f"OpenVINO cannot convert {onnx_path.parent.name}/{onnx_path.name}: {reason}"
            f"{_where(onnx_path, reason)}"
        ) from error
    _keep_concat_apart(model)
    _read_keys_as_they_are(model)
    _name_deterministically(model)
    folder.mkdir(parents=True, exist_ok=True)
    names = _statistics(model)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    _keep_in_f32(folder / MODEL, names)


def _adapted(onnx_path: Path, scratch: Path) -> Path:
    """A file with the graph in the form that runs fastest here; the file itself if that is it already."""
    import onnx_ir as ir

    from qdeploy.export.lower import CHANNELS_LAST, adapt
    from qdeploy.export.passes.narrow_sums import NarrowSums

    try:
        graph = ir.load(onnx_path)
    except Exception:  # OpenVINO will say what is wrong with the file
        return onnx_path
    if not adapt(graph, (*CHANNELS_LAST, NarrowSums) if int8_sums_saturate() else CHANNELS_LAST):
        return onnx_path
    stored = (value.const_value for value in graph.graph.initializers.values())
    for location in {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}:
        (scratch / location).symlink_to((onnx_path.parent / location).absolute())
    ir.save(graph, scratch / onnx_path.name)
    return scratch / onnx_path.name


def _where(onnx_path: Path, message: str) -> str:
    """Names of the first nodes of the operations that a message speaks of."""
    import onnx

    try:
        nodes = onnx.load(onnx_path, load_external_data=False).graph.node
    except Exception:  # the message tells already that the file cannot be read
        return ""
    spoken = set(re.findall(r"[\w.]+", message))
    found = [node.name for node in nodes if f"{node.domain}.{node.op_type}".lstrip(".") in spoken]
    return f", first in {found[0]!r}" if found else ""


def _keep_concat_apart(model: Any) -> None:
    """Keep OpenVINO from moving a quantization in front of the Concat whose output it quantizes.

    OpenVINO 2026.4 does so where nothing else reads the Concat, then computes the next convolution as if
    the zero point of its unsigned input were 0: 10 dB from the right result. A maximum with the lowest
    float stops the move, and runs within the quantization's own kernel.
    """
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        above = op.input_value(0)
        while above.get_node().get_type_name() in _MOVES:
            above = above.get_node().input_value(0)
        if above.get_node().get_type_name() != "Concat":
            continue
        name = op.get_friendly_name()
        lowest = opset13.constant(-3.4028235e38, dtype="float32", name=f"{name}/lowest")
        barrier = opset13.maximum(op.input_value(0), lowest, name=f"{name}/barrier")
        op.input(0).replace_source_output(barrier.output(0))


def _read_keys_as_they_are(model: Any) -> None:
    """Let a product take a matrix's rows for columns instead of transposing it.

    OpenVINO does so by itself only after it has merged the transposition with the one that splits heads, and
    then writes the keys out transposed.
    """
    from openvino import opset13

    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul":
            continue
        right = op.input_value(1).get_node()
        options = op.get_attributes()
        if right.get_type_name() != "Transpose" or options["transpose_a"] or options["transpose_b"]:
            continue
        order = right.input_value(1).get_node()
        rank = right.get_output_partial_shape(0).rank
        if order.get_type_name() != "Constant" or rank.is_dynamic or rank.get_length() < 3:
            continue
        last = rank.get_length() - 1
        if list(order.get_data()) != [*range(last - 1), last, last - 1]:
            continue
        product = opset13.matmul(
            op.input_value(0), right.input_value(0), False, True, name=op.get_friendly_name()
        )
        for reader in list(op.output(0).get_target_inputs()):
            reader.replace_source_output(product.output(0))


def _statistics(model: Any) -> set[str]:
    """Names of the operations behind a reduction that have one number for each channel, or fewer.

    The reductions themselves are not among them: they read 16 bits, and sum and write 32.
    """
    found: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("ReduceMean", "ReduceL2") or op.get_friendly_name() in found:
            continue
        most, waiting = _row_size(op), [op]
        while waiting:
            for reader in waiting.pop().output(0).get_target_inputs():
                node = reader.get_node()
                if node.get_friendly_name() not in found and _row_size(node) <= most:
                    found.add(node.get_friendly_name())
                    waiting.append(node)
    return found


def _row_size(op: Any) -> float:
    """Numbers that an operation computes for each row of the batch; infinite if unknown or the result."""
    if op.get_type_name() == "Result":
        return inf
    sizes = list(op.get_output_partial_shape(0))[1:]
    return inf if any(size.is_dynamic for size in sizes) else prod(size.get_length() for size in sizes)


def _keep_in_f32(path: Path, names: set[str]) -> None:
    """Mark operations of an IR as ones that stay in f32 where other floats become bf16.

    A variance is the difference of two numbers that may be nearly equal. OpenVINO has the mark, but its Python
    interface cannot set it.
    """
    from xml.etree import ElementTree

    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") not in names:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(1 if layer.find("data") is not None else 0, info)
        ElementTree.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _name_deterministically(model: Any) -> None:
    """Replace the names that OpenVINO makes up from a counter of the whole process."""
    for index, op in enumerate(model.get_ordered_ops()):
        if op.get_friendly_name() == op.get_name():
            op.set_friendly_name(f"{op.get_type_name()}/{index}")


BACKEND = Backend(
    name="openvino",
    description="OpenVINO on CPUs: int8 (weights of 7 bits at most without VNNI), everything else in f32 or bf16",
    package="openvino",
    install="openvino",
    build=build,
    load=OpenVINOEngine,
    rank=10,
    lacks=frozenset({"int4b64", "int4b128", "fp8"}),
    narrow_sums=True,
)
