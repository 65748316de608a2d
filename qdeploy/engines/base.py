"""The Engine: one denoiser call on one runtime; and the registry of the backends that make engines.

A backend is one module of this package with a ``BACKEND``; nothing else needs to know of it. Modules keep
the import of their runtime inside functions, so that the list of backends can be read without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from qdeploy.errors import CapabilityError, InvalidInputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qdeploy.artifact import Artifact
    from qdeploy.runtime.denoiser import EngineDenoiser

# Backends that people ask for and that this version cannot build.
PLANNED = {"tensorrt": "TensorRT is not supported by this version of qdeploy: choose another --backend"}
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class Kernel:
    """Something the runtime executed, in the runtime's own words.

    Attributes:
        name: the runtime's name for it.
        layers: names of the graph's nodes that it computes.
        kind: the runtime's type of operation, such as ``Convolution``.
        precision: what it multiplies or moves: ``int8``, ``f32``, ``bf16`` ...
        type: the implementation that ran, such as ``brgconv_avx512_I8``.
    """

    name: str
    layers: tuple[str, ...]
    kind: str
    precision: str
    type: str


@dataclass(frozen=True)
class Port:
    """An input of a graph: its dtype by torch's name, and its shape, None where any size is welcome."""

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
        artifact: the engine's folder.

    Attributes:
        backend: name of the backend.
        path: the engine's folder.
        component: ``unet`` or ``transformer``, the denoiser's name in a pipeline.
        precision: what everything that is not int8 is computed in, ``f32`` or ``bf16``.
        config: the denoiser's diffusers configuration.
        ports: the graph's inputs.
    """

    backend: ClassVar[str]
    ports: dict[str, Port]

    def __init__(self, artifact: Artifact) -> None:
        self.path = artifact.path
        self.facts = artifact.facts
        self.sha256 = artifact.sha256
        self.component = str(self.facts["component"])
        self.precision = str(self.facts["precision"])
        self.config: dict[str, Any] = json.loads(artifact.file(f"{self.component}/config.json").read_text())

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction.

        Args:
            inputs: tensors named as in `qdeploy.denoiser.flatten_inputs`. ``timestep`` is a scalar or
                has one entry per row; rows of different t take one call per distinct t.

        Returns:
            ``[batch, ...]``, float32, a tensor of its own.

        Raises:
            InvalidInputError: an input is missing, unknown, or of a shape that the graph cannot take.
        """
        import torch

        ready = self._prepare(inputs)
        t = ready.get("timestep")
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
        """One call of the runtime: contiguous CPU tensors of the graph's dtypes, ``timestep`` a scalar."""

    @abstractmethod
    def _kernels(self, inputs: dict[str, Tensor]) -> list[Kernel]:
        """What the runtime executes for inputs as `_run` gets them."""

    def kernels(self, inputs: Mapping[str, Tensor]) -> list[Kernel]:
        """What the runtime executes for these inputs, read from the runtime itself.

        Raises:
            InvalidInputError: as in a call.
        """
        ready = self._prepare(inputs)
        if "timestep" in ready and ready["timestep"].ndim > 0:
            ready["timestep"] = ready["timestep"][0]
        return self._kernels(ready)

    def as_denoiser(self) -> EngineDenoiser:
        """The engine in the shape of a diffusers model, for ``pipe.unet`` or ``pipe.transformer``."""
        from qdeploy.runtime.denoiser import EngineDenoiser

        return EngineDenoiser(self)

    def close(self) -> None:  # noqa: B027 - a runtime without anything to free need not override it
        """Free what the runtime holds. The engine cannot be called afterwards."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs checked, and cast to the graph's dtypes without copying what fits already."""
        import torch

        unknown, missing = sorted(inputs.keys() - self.ports.keys()), sorted(self.ports.keys() - inputs.keys())
        if unknown:
            raise InvalidInputError(
                f"the graph of {self.path} has no input {unknown[0]!r}, it takes {', '.join(self.ports)}"
            )
        if missing:
            raise InvalidInputError(f"the input {missing[0]!r} of {self.path} is missing")
        ready: dict[str, Tensor] = {}
        batch: int | None = None
        for name, port in self.ports.items():
            x = inputs[name].detach().to("cpu", getattr(torch, port.dtype)).contiguous()
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
        t = ready.get("timestep")
        if t is not None and t.ndim > 0:
            if t.ndim > 1 or len(t) not in (1, batch):
                raise InvalidInputError(
                    f"'timestep' must be a scalar or have one entry for each of {batch} rows, not {list(t.shape)}"
                )
            if len(t) == 1:
                ready["timestep"] = t[0]
        return ready


# -- backends ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A runtime that engines can be built for.

    Attributes:
        name: the word for ``--backend``; also the pip extra that brings the package.
        description: one line for people.
        package: the import name of the runtime.
        precisions: what it can compute float operations in.
        build: writes the runtime's files for a ``model.onnx`` into a folder.
        load: the engine of a verified folder, with a number of threads or the runtime's own choice.
        rank: ``auto`` takes the available backend of the highest rank; 0 is never taken.
    """

    name: str
    description: str
    package: str
    build: Callable[[Path, Path], None]
    load: Callable[[Artifact, int | None], Engine]
    precisions: tuple[str, ...] = PRECISIONS
    rank: int = 0

    def available(self) -> bool:
        """Whether the runtime is installed."""
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """Make sure that the runtime is installed.

        Raises:
            CapabilityError: it is not.
        """
        if not self.available():
            raise CapabilityError(
                f"the backend {self.name} needs the package {self.package}: pip install 'qdeploy[{self.name}]'"
            )

    def version(self) -> str:
        """Version of the installed runtime."""
        return str(importlib.import_module(self.package).__version__)


@cache
def backends() -> dict[str, Backend]:
    """All backends by name, best first: one for each module of this package that has a ``BACKEND``."""
    package = importlib.import_module("qdeploy.engines")
    found: list[Backend] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"qdeploy.engines.{info.name}")
        backend = getattr(module, "BACKEND", None)
        if isinstance(backend, Backend):
            found.append(backend)
    return {backend.name: backend for backend in sorted(found, key=lambda b: (-b.rank, b.name))}


def find_backend(name: str = "auto") -> Backend:
    """The backend of that name, its package installed.

    Args:
        name: a backend, or ``auto`` for the fastest that is installed.

    Raises:
        UsageError: there is no such backend.
        CapabilityError: its package is missing, or this version cannot build for it.
    """
    if name == "auto":
        ranked = [backend for backend in backends().values() if backend.rank > 0]
        chosen = next((backend for backend in ranked if backend.available()), ranked[0])
        chosen.require()
        return chosen
    if name in PLANNED and name not in backends():
        raise CapabilityError(PLANNED[name])
    if name not in backends():
        raise UsageError(f"unknown backend {name!r}: choose from auto, {', '.join(backends())}")
    backends()[name].require()
    return backends()[name]


def why(error: BaseException) -> str:
    """The telling line of a runtime's long message: the last one."""
    lines = [line.strip(" -\t") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__).rstrip(".")
