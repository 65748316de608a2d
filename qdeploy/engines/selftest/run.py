"""Build each graph for a backend, run it, and compare it with ONNX Runtime without optimizations."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.engines.build import check_precision
from qdeploy.engines.doctor import doctor
from qdeploy.engines.registry import Backend, find_backend
from qdeploy.engines.selftest.graphs import CHANNELS, FORMATS, PATTERNS, SIZE, GraphFormat, model
from qdeploy.engines.spec import EngineSpec
from qdeploy.system.errors import QDeployError, UsageError
from qdeploy.system.progress import track
from qdeploy.system.suggest import unknown
from qdeploy.system.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

COMPONENT = "unet"
BATCHES = (1, 2)
# dB of signal by error. Two roundings to 8 bits may differ in the last digit here and there; fp8 has 3 bits.
LEAST = {"fp32": 60.0, "int8": 40.0, "int7": 40.0, "int4": 40.0, "fp8": 30.0}
_CONFIG = '{"_class_name": "UNet2DModel"}'


@dataclass
class Case:
    """One graph in one format on one backend.

    Attributes:
        pattern: the graph.
        format: how it is quantized.
        status: ``passed``, ``inaccurate``, ``refused`` by the backend with a reason, or ``crashed``.
        decibels: agreement with ONNX Runtime, the worst batch.
        max_abs: largest difference.
        kernels: what ran, as name, kind, precision and implementation.
        int8: share of the weighted layers that ran in int8; None where none was meant to.
        reason: the backend's message, or where it crashed.
        seconds: of building and running.
    """

    pattern: str
    format: str
    status: str = "crashed"
    decibels: float | None = None
    max_abs: float | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    int8: float | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass
class SelftestReport:
    """The result of a self test, with the machine it ran on."""

    backend: str
    version: str
    precision: str
    cases: list[Case]
    machine: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(case.status == "passed" for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """One object to send."""
        return {
            "passed": self.passed,
            "backend": self.backend,
            "version": self.version,
            "precision": self.precision,
            "cases": [asdict(case) for case in self.cases],
            "doctor": self.machine,
        }

    def table(self) -> str:
        """The result for people."""
        rows = [
            [
                case.format,
                case.pattern,
                case.status,
                "" if case.decibels is None else f"{case.decibels:.1f}",
                "" if case.int8 is None else f"{case.int8:.0%}",
                case.reason or ", ".join(dict.fromkeys(k["type"] for k in case.kernels if k["multiplies"])),
            ]
            for case in self.cases
        ]
        title = f"{self.backend} {self.version}, {self.precision}"
        return f"{title}\n{Table(['format', 'graph', 'result', 'dB', 'in int8', 'kernels'], rows).text()}"

    @property
    def failures(self) -> str:
        """The cases that did not pass, in one line."""
        return "; ".join(f"{c.format} {c.pattern} {c.status}" for c in self.cases if c.status != "passed")


def selftest(
    backend: str = "auto", precision: str = "f32", formats: Sequence[str] | None = None
) -> SelftestReport:
    """Run every graph in every format that a backend has.

    Args:
        backend: a name, or ``auto``.
        precision: what is not quantized is computed in.
        formats: names of `FORMATS`; those that the backend and the machine have by default.

    Raises:
        UsageError: no such backend, precision or format.
        CapabilityError: it is not usable on this machine.
    """
    chosen = find_backend(backend)
    check_precision(chosen, precision)
    for name in formats or ():
        if name not in FORMATS:
            raise UsageError(unknown("format", name, FORMATS))
    kinds = [FORMATS[name] for name in formats or _formats_of(chosen)]
    todo = [
        (pattern, kind)
        for kind in kinds
        for pattern in PATTERNS
        if kind.patterns is None or pattern in kind.patterns
    ]
    cases = [_case(chosen, pattern, kind, precision) for pattern, kind in track(todo, "self test")]
    return SelftestReport(chosen.name, chosen.version(), precision, cases, doctor().to_json())


def _formats_of(backend: Backend) -> list[str]:
    """Those that a machine has kernels for; elsewhere a refusal would be no news."""
    if backend.device != "cuda":
        return ["fp32", "int8", "int7"]
    from qdeploy.system.gpu import find_gpu

    return ["fp32", "int8", "int4", *(["fp8"] if find_gpu().sm >= 89 else [])]


def _case(backend: Backend, pattern: str, kind: GraphFormat, precision: str) -> Case:
    case = Case(pattern, kind.name)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _play(case, backend, kind, precision, Path(folder))
        except QDeployError as error:
            case.status, case.reason = "refused", str(error)
        except Exception as error:  # the report is what the user sends: it must come in any case
            where = traceback.extract_tb(error.__traceback__)[-1]
            case.reason = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
    case.seconds = round(time.perf_counter() - began, 3)
    return case


def _play(case: Case, backend: Backend, kind: GraphFormat, precision: str, folder: Path) -> None:
    import onnx

    from qdeploy.engines.int8_share import int8_layers, multiplies
    from qdeploy.export.macs import meant_int8
    from qdeploy.system.decibels import distance

    path = folder / "model.onnx"
    onnx.save(model(case.pattern, kind), path)
    build_options = {"precision": precision, "batch": max(BATCHES)} if backend.build_options else {}
    backend.build(path, folder / "engine" / COMPONENT, **build_options)
    with backend.load(_spec(folder / "engine", precision, kind), 1) as engine:
        found: list[Mapping[str, float]] = []
        for batch in BATCHES:
            inputs = example(batch)
            found.append(distance(engine(inputs).cpu(), oracle(path, inputs)))
        kernels = engine.kernels(example(1))
    case.decibels = min(result["pooled_db"] for result in found)
    case.max_abs = max(result["max_abs"] for result in found)
    case.kernels = [asdict(kernel) | {"multiplies": multiplies(kernel)} for kernel in kernels]
    meant = meant_int8(path)
    if kind.activations == "INT8" and meant:
        case.int8 = round(len(meant & int8_layers(kernels)) / len(meant), 3)
    case.status = "passed" if case.decibels >= _least(kind, precision) else "inaccurate"


def _least(kind: GraphFormat, precision: str) -> float:
    """In 16 bits a rounding costs 66 dB (f16) or 48 dB (bf16), and a graph has several."""
    return min(LEAST[kind.name], {"f32": 99.0, "f16": 50.0, "bf16": 30.0}[precision])


def _spec(folder: Path, precision: str, kind: GraphFormat) -> EngineSpec:
    """A minimal engine folder, with what loading reads."""
    (folder / COMPONENT / "config.json").write_text(_CONFIG)
    return EngineSpec(
        folder, COMPONENT, precision, activations="none" if kind.activations is None else "int8"
    )


def example(batch: int) -> dict[str, Tensor]:
    """Inputs of a call, equal on every machine."""
    import torch

    random = torch.Generator().manual_seed(batch)
    sample = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=random)
    return {"sample": sample, "timestep": torch.tensor(250.0)}


def oracle(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """What ONNX Runtime computes node by node."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
