"""A plan as an `Engine`: pipelines, ``sample``, ``check`` and ``benchmark`` run on it unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from qdeploy.engines.base import Engine, Kernel, Port
from qdeploy.engines.tensorrt.cuda import TorchCuda
from qdeploy.engines.tensorrt.execution import Execution
from qdeploy.engines.tensorrt.flavour import RTX, TENSORRT, Flavour
from qdeploy.engines.tensorrt.inspector import kernels, read_layers
from qdeploy.engines.tensorrt.plan import open_plan
from qdeploy.engines.tensorrt.runtime_cache import RuntimeCache
from qdeploy.engines.tensorrt.versions import load_tensorrt
from qdeploy.store.paths import cache_folder
from qdeploy.system.gpu import Gpu, require_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.spec import EngineSpec


class TensorRTEngine(Engine):
    """A plan on the first GPU.

    Tensors that already lie there are used in place. Batches larger than the plan's profile run in parts.

    Args:
        spec: the engine's files, and how they are to be run.
        threads: of no use on a GPU.

    Raises:
        CapabilityError: no GPU, no TensorRT, or a plan that was made for others.
        InvalidInputError: the plan is damaged.
    """

    backend = TENSORRT.backend
    device = "cuda"
    flavour: ClassVar[Flavour] = TENSORRT

    def __init__(self, spec: EngineSpec, threads: int | None = None) -> None:
        super().__init__(spec)
        gpu = require_gpu(packages=self.flavour.cuda)
        self._trt = load_tensorrt(self.flavour)
        cuda = TorchCuda()
        self._plan = open_plan(self._trt, spec.component_folder, gpu, self.flavour)
        try:
            self._execution = Execution(self._trt, self._plan, cuda, kept=self._kept_kernels(gpu))
        except BaseException:
            self._plan.close()
            raise
        self.ports = {
            port.name: Port(port.dtype, tuple(None if size == -1 else size for size in port.shape))
            for port in self._execution.ports.values()
            if port.is_input
        }
        heads = [
            shapes.largest[0]
            for profile in self._plan.profiles
            for name, shapes in profile.items()
            if self.ports[name].batched
        ]
        self._largest = max(heads, default=None)

    def _kept_kernels(self, gpu: Gpu) -> RuntimeCache | None:
        """The kernels of earlier runs, where the library compiles them on the GPU."""
        if not self.flavour.targets:
            return None
        sidecar = self._plan.sidecar
        file = cache_folder() / self.backend / f"{sidecar['plan_sha256'][:32]}-sm{gpu.sm}.kernels"
        return RuntimeCache(self._trt, self._plan.engine, file, not sidecar["options"]["weight_streaming"])

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        batched = [name for name in inputs if self.ports[name].batched]
        rows = len(inputs[batched[0]]) if batched else 0
        if self._largest is None or rows <= self._largest:
            return self._call(inputs)
        parts = [x.split(self._largest) for x in (inputs[name] for name in batched)]
        return torch.cat([self._call({**inputs, **dict(zip(batched, part))}) for part in zip(*parts)])

    def _call(self, inputs: dict[str, Tensor]) -> Tensor:
        on = {name: x.cpu() if self._execution.ports[name].host else x for name, x in inputs.items()}
        (output,) = self._execution(on).values()
        result: Tensor = output.float()
        return result

    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        return kernels(read_layers(self._trt, self._plan.engine))

    def timed(self, inputs: Mapping[str, Tensor]) -> float:
        """Milliseconds of a call by CUDA events, inputs and output on the GPU."""
        import torch

        ready = {name: x.to(self.device) for name, x in inputs.items()}
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        self(ready)
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))

    def close(self) -> None:
        """Free graphs and context, then the engine, then the runtime."""
        self._execution.close()
        self._plan.close()


class TensorRTRTXEngine(TensorRTEngine):
    """A plan of TensorRT for RTX; arguments and errors as for `TensorRTEngine`."""

    backend = RTX.backend
    flavour = RTX
