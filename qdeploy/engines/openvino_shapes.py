"""One OpenVINO model, compiled for each set of input shapes, for any number of threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from qdeploy.engines.base import Port, why
from qdeploy.engines.blobs import Blobs
from qdeploy.engines.pool import Pool
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say
from qdeploy.system.telemetry import import_silently

if TYPE_CHECKING:
    from torch import Tensor

# Compiled models that are kept, one per set of input shapes. Each holds its own packed weights.
KEPT_SHAPES = 4
DEVICES = ("CPU", "GPU", "NPU")

_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}


@dataclass(frozen=True)
class Compiled:
    """The model compiled for one set of input shapes.

    Attributes:
        model: OpenVINO's compiled model.
        imported: whether an earlier process compiled it.
        outputs: shapes of the outputs.
        requests: inference requests, one for each thread that calls at the same time.
    """

    model: Any
    imported: bool
    outputs: tuple[tuple[int, ...], ...]
    requests: Pool[Any]


class ShapedModel:
    """A model of OpenVINO's that is called with torch tensors.

    Shapes are fixed before compiling: static kernels are faster, and the plugin can plan memory in advance. Any
    number of threads may call it at the same time.

    Args:
        core: OpenVINO's.
        model: as it was read.
        path: its folder, for messages.
        options: of the compilation.
        blobs: where compiled models are kept from one process to the next; None for nowhere.
        device: ``CPU``, ``GPU`` or ``NPU``.

    Attributes:
        ports: its inputs by name.
        outputs: names of its outputs.
    """

    def __init__(
        self,
        core: Any,
        model: Any,
        path: Path,
        options: Mapping[str, Any],
        blobs: Blobs | None = None,
        device: str = "CPU",
    ) -> None:
        self._core, self._model, self._path, self._device = core, model, path, device
        self.options, self.blobs = dict(options), blobs
        self.ports = {
            input_name(port): Port(
                _DTYPES[port.element_type.get_type_name()],
                tuple(None if dim.is_dynamic else dim.get_length() for dim in port.partial_shape),
            )
            for port in model.inputs
        }
        self.outputs = tuple(str(port.any_name) for port in model.outputs)
        # One thread at a time compiles; each runs inference requests of its own.
        self._lock = RLock()
        self.compiled: OrderedDict[tuple[tuple[int, ...], ...], Compiled] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs, float32: contiguous tensors of the model's dtypes in, tensors of their own out."""
        import torch

        compiled = self.at(inputs)
        outputs = [torch.empty(shape, dtype=torch.float32) for shape in compiled.outputs]
        with compiled.requests.take() as request:
            # Both sides read and write the same memory; nothing is copied.
            for name, x in inputs.items():
                request.set_tensor(name, shared(x))
            for index, output in enumerate(outputs):
                request.set_output_tensor(index, shared(output))
            request.infer()
        return outputs

    def at(self, inputs: Mapping[str, Tensor]) -> Compiled:
        """The model for the shapes of these inputs, compiled when they are first seen.

        Raises:
            InvalidInputError: OpenVINO cannot run it at these shapes.
        """
        key = tuple(tuple(inputs[name].shape) for name in self.ports)
        with self._lock:
            if key in self.compiled:
                self.compiled.move_to_end(key)
                return self.compiled[key]
            model, imported = self._kept(inputs)
            shapes = tuple(tuple(output.shape) for output in model.outputs)
            self.compiled[key] = Compiled(model, imported, shapes, Pool(model.create_infer_request))
            if len(self.compiled) > KEPT_SHAPES:
                self.compiled.popitem(last=False)
            return self.compiled[key]

    def compile_for(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The model, compiled anew for the shapes of these inputs, with further options.

        Raises:
            InvalidInputError: OpenVINO cannot.
        """
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        try:
            with self._lock:
                self._model.reshape(shapes)
                return self._core.compile_model(self._model, self._device, {**self.options, **options})
        except RuntimeError as error:
            raise InvalidInputError(f"OpenVINO cannot run {self._path} at {shapes}: {why(error)}") from error

    def close(self) -> None:
        """Free all compiled models."""
        with self._lock:
            self.compiled.clear()

    def _kept(self, inputs: Mapping[str, Tensor]) -> tuple[Any, bool]:
        """The compiled model from an earlier process, else compiled now and kept for the next; and which it is."""
        if self.blobs is None:
            return self.compile_for(inputs), False
        shapes = {name: list(inputs[name].shape) for name in self.ports}
        request: dict[str, Any] = {"shapes": shapes, "options": self.options}
        if self._device != "CPU":
            request["device"] = self._device
        blob = self.blobs.read(request)
        if blob is not None:
            try:
                return self._core.import_model(BytesIO(blob), self._device, self.options), True
            except RuntimeError:
                say(f"OpenVINO cannot load its compiled model of {self._path}: compiling it again")
                self.blobs.drop(request)
        compiled, stream = self.compile_for(inputs), BytesIO()
        compiled.export_model(stream)
        self.blobs.write(request, stream.getvalue())
        return compiled, False


def input_name(port: Any) -> str:
    """The full name of an input, which may have a shorter one for other programs."""
    return max(map(str, port.get_names()), key=lambda name: (len(name), name))


def shared(x: Tensor) -> Any:
    """A tensor as OpenVINO's, in the same memory."""
    openvino = import_silently("openvino")

    return openvino.Tensor(x.numpy(), shared_memory=True)
