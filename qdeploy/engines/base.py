"""The Engine: one denoiser call on one runtime."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.sizes import check_size
from qdeploy.store.timesteps import check_timestep
from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.engines.drop_in.denoiser import EngineDenoiser
    from qdeploy.engines.spec import EngineSpec


UNKNOWN = "unknown"
DYNAMIC = "int8-dynamic"  # activations that the runtime rounds by itself (`qdeploy.quant.dynamic`)


@dataclass(frozen=True)
class Kernel:
    """One operation that a runtime executed, as the runtime reports it.

    Attributes:
        name: the runtime's name for it.
        layers: names of the graph's nodes that it computes.
        kind: the runtime's type of operation, such as ``Convolution``.
        precision: what it multiplies or moves: ``int8``, ``f32``, ``bf16`` ...; `UNKNOWN` where the
            runtime does not report it.
        type: the implementation that ran, such as ``brgconv_avx512_I8``.
        ms: median time of a call in milliseconds; None if it was not measured or not reported.
    """

    name: str
    layers: tuple[str, ...]
    kind: str
    precision: str
    type: str
    ms: float | None = None


@dataclass(frozen=True)
class Port:
    """An input of a graph: its dtype by torch's name, and its shape, None for an axis of any size."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def batched(self) -> bool:
        """Whether the first axis counts the samples."""
        return len(self.shape) > 0 and self.shape[0] is None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape fits."""
        sizes = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(want in (None, size) for want, size in sizes)


class Engine(ABC):
    """A denoiser that a runtime executes.

    Args:
        spec: the engine's files, and how they are to be run.

    Attributes:
        backend: name of the backend.
        device: the torch device that its inputs have to be on.
        spec: as given.
        path: the engine's folder.
        sha256: identity of the engine; empty while it is being built.
        component: ``unet`` or ``transformer``, the denoiser's name in a pipeline.
        precision: what everything that is not int8 is computed in, ``f32`` or ``bf16``.
        config: the denoiser's diffusers configuration.
        call: how the denoiser is called, if that does not follow from its inputs.
        ports: the graph's inputs.
    """

    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    ports: dict[str, Port]

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.path = spec.folder
        self.sha256 = spec.sha256
        self.component = spec.component
        self.precision = spec.precision
        self.config = read_json_object(spec.component_folder / "config.json")
        self.call = spec.call

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction.

        Args:
            inputs: tensors named as in `qdeploy.model.inputs.flatten_inputs`. ``timestep`` is a scalar or
                has one entry per row; rows of different t take one call per distinct t.

        Returns:
            ``[batch, ...]``, float32, a new tensor on the device of the inputs.

        Raises:
            InvalidInputError: an input is missing, unknown, or of a shape that the graph cannot take.
        """
        ready = self._prepare(inputs)
        # A pipeline may keep the timestep on another device.
        home = next((x.device for name, x in inputs.items() if name != "timestep"), None)
        return self._grouped(ready).to(home)

    def _grouped(self, ready: dict[str, Tensor]) -> Tensor:
        """One call for each distinct timestep."""
        import torch

        t = ready.get("timestep")
        if t is not None:
            for value in set(t.flatten().tolist()):
                check_timestep(self.spec.timesteps, self.spec.time_table, value, str(self.path))
        if t is None or t.ndim == 0:
            return self._run(ready)
        groups: dict[float, list[int]] = {}
        for row, value in enumerate(t.tolist()):
            groups.setdefault(value, []).append(row)
        if len(groups) == 1:
            return self._run({**ready, "timestep": t[0]})
        output: Tensor | None = None
        for rows in groups.values():
            index = torch.tensor(rows)
            part = {name: x[index] if self.ports[name].batched else x for name, x in ready.items()}
            result = self._run({**part, "timestep": t[rows[0]]})
            if output is None:
                output = result.new_empty((len(t), *result.shape[1:]))
            output[index] = result
        assert output is not None
        return output

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        """One call of the runtime: contiguous tensors of the graph's dtypes on `device`, ``timestep`` a scalar."""

    @abstractmethod
    def _kernels(self, inputs: dict[str, Tensor], calls: int) -> list[Kernel]:
        """What the runtime executes for the inputs of `_run`, timed over ``calls`` calls if not 0."""

    def kernels(self, inputs: Mapping[str, Tensor], *, calls: int = 0) -> list[Kernel]:
        """What the runtime executes for these inputs, read from the runtime itself.

        Args:
            inputs: those of a call.
            calls: number of calls that each kernel is timed over; 0 for no times. Timing every kernel slows a
                call down, so that their sum is somewhat above the engine's latency.

        Raises:
            InvalidInputError: as in a call.
        """
        ready = self._prepare(inputs)
        if "timestep" in ready and ready["timestep"].ndim > 0:
            ready["timestep"] = ready["timestep"][0]
        return self._kernels(ready, calls)

    def timed(self, inputs: Mapping[str, Tensor]) -> float:
        """Milliseconds of a call."""
        began = time.perf_counter()
        self(inputs)
        return (time.perf_counter() - began) * 1e3

    def as_denoiser(self) -> EngineDenoiser:
        """The engine as a diffusers model, for ``pipe.unet`` or ``pipe.transformer``."""
        from qdeploy.engines.drop_in.denoiser import EngineDenoiser

        return EngineDenoiser(self)

    def close(self) -> None:  # noqa: B027 - a runtime without anything to free need not override it
        """Release the runtime's resources. The engine cannot be called afterwards."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs checked, and cast to the graph's dtypes without copying what fits already."""
        import torch

        for name in inputs.keys() - self.ports.keys():
            raise InvalidInputError(
                f"the graph of {self.path} has no input {name!r}, it takes {', '.join(self.ports)}"
            )
        for name in self.ports.keys() - inputs.keys():
            raise InvalidInputError(f"the input {name!r} of {self.path} is missing")
        ready: dict[str, Tensor] = {}
        batch: int | None = None
        for name, port in self.ports.items():
            x = inputs[name].detach().to(self.device, getattr(torch, port.dtype)).contiguous()
            if name != "timestep" or port.shape:
                if not port.takes(x.shape):
                    wanted = ", ".join("batch" if size is None else str(size) for size in port.shape)
                    raise InvalidInputError(
                        f"the graph of {self.path} takes {name!r} of shape [{wanted}], not {list(x.shape)}"
                    )
                if port.batched and batch not in (None, x.shape[0]):
                    raise InvalidInputError(f"{name!r} has {x.shape[0]} rows, but other inputs have {batch}")
                if port.batched:
                    batch = x.shape[0]
            ready[name] = x
        sample = next((x for name, x in ready.items() if name != "timestep" and x.ndim == 4), None)
        if sample is not None:
            check_size(self.spec.sizes, sample.shape, str(self.path))
        t = ready.get("timestep")
        if t is not None and t.ndim > 0:
            if t.ndim > 1 or len(t) not in (1, batch):
                raise InvalidInputError(
                    f"'timestep' must be a scalar or have one entry for each of {batch} rows, not "
                    f"{list(t.shape)}"
                )
            if len(t) == 1:
                ready["timestep"] = t[0]
        return ready


def why(error: BaseException) -> str:
    """The last line of a runtime's message, which states the cause."""
    lines = [line.strip(" -\t") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__).rstrip(".")
