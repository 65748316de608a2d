"""What the scenarios are played on: graphs, options and a GPU that is none."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.engines.tensorrt.graph import Graph, GraphTensor
from qdeploy.engines.tensorrt.options import Options
from qdeploy.system.gpu import Gpu

ADA = Gpu("Fake Ada", (8, 9), 24 * 2**30, 13000)
GRAPH = Graph(
    (GraphTensor("sample", "float32", ("batch", 4, 8, 8)), GraphTensor("timestep", "float32", ())),
    (GraphTensor("out_sample", "float32", ("batch", 4, 8, 8)),),
    21,
    frozenset({"int8"}),
    1000,
)
SHAPES = "sample:1x4x8x8,2x4x8x8,4x4x8x8"


def write_graph(path: Path) -> None:
    """A graph with the inputs and outputs that the recording library claims."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = ["batch", 4, 8, 8]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["sample", "w"], ["x"], name="body.conv", pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["x", "timestep"], ["out_sample"], name="add"),
        ],
        "bench",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


class Library:
    """The recording library that the bindings are linked to."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.fake_journal.restype = ctypes.c_char_p

    @contextmanager
    def failing(self, what: str = "") -> Iterator[None]:
        """Start a new journal; one thing may go wrong."""
        self._library.fake_reset(what.encode())
        yield

    @property
    def journal(self) -> list[str]:
        return self._library.fake_journal().decode().splitlines()


@dataclass
class Device:
    type: str = "cuda"


@dataclass
class Buffer:
    """As much of a tensor as a call looks at."""

    shape: tuple[int, ...]
    dtype: str = "torch.float32"
    pointer: int = 4096
    contiguous: bool = True
    device: Device = field(default_factory=Device)

    def data_ptr(self) -> int:
        return self.pointer

    def is_contiguous(self) -> bool:
        return self.contiguous


@dataclass
class FakeCuda:
    """Streams and memory that only keep a record."""

    stream: int = 0x77
    events: list[str] = field(default_factory=list)
    recordable: bool = True
    pointer: int = 1 << 20

    def empty(self, shape: tuple[int, ...], dtype: str, host: bool = False) -> Buffer:
        self.pointer += 4096
        return Buffer(shape, f"torch.{dtype}", self.pointer, device=Device("cpu" if host else "cuda"))

    def enter(self, tensors: Mapping[str, Any]) -> None:
        self.events.append("enter")

    def leave(self, tensors: Mapping[str, Any]) -> None:
        self.events.append("leave")

    def copy(self, source: Buffer, target: Buffer) -> None:
        self.events.append(f"copy to {target.pointer}")

    def clone(self, source: Buffer) -> Buffer:
        self.events.append("clone")
        return self.empty(source.shape, source.dtype.removeprefix("torch."))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        if not self.recordable:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        return lambda: self.events.append("replay")

    def synchronize(self) -> None:
        self.events.append("synchronize")


def inputs(batch: int = 2, **change: Any) -> dict[str, Buffer]:
    return {"sample": Buffer((batch, 4, 8, 8), **change), "timestep": Buffer(())}


def plan_folder(folder: Path, *, content: bytes = b"PLAN of a test", **change: Any) -> Path:
    """A folder as a build leaves it; ``change`` goes into the sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.plan").write_bytes(content)
    sidecar = {
        "plan_sha256": sha256(content).hexdigest(),
        "plan_bytes": len(content),
        "tensorrt": "11.4.0.106",
        "gpu": ADA.to_json(),
        "profiles": SHAPES,
        "options": Options().facts(),
    }
    sidecar["options"] |= {
        key: change.pop(key) for key in list(change) if key in sidecar["options"] and key != "gpu"
    }
    (folder / "plan.json").write_text(json.dumps(sidecar | change))
    return folder
