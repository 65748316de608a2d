"""A whole `TensorRTEngine` over the recording library, with torch tensors in the machine's memory.

The library plays a network that copies its sample, so that what comes out can be told. Run as a program.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from qdeploy.engines.base import Engine
from qdeploy.engines.spec import EngineSpec
from qdeploy.engines.tensorrt import engine as module
from qdeploy.system.errors import InvalidInputError
from tests.engines.bundles import CONFIG
from tests.engines.tensorrt.bench import ADA, Library, plan_folder


class HostCuda:
    """The GPU's part, played by the machine's memory."""

    stream = 0x77

    def empty(self, shape: tuple[int, ...], dtype: str, host: bool = False) -> torch.Tensor:
        return aligned(torch.zeros(shape, dtype=getattr(torch, dtype)))

    def enter(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    leave = enter

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def clone(self, source: torch.Tensor) -> torch.Tensor:
        return aligned(source)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def synchronize(self) -> None: ...


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy at an address that 256 divides."""
    raw = torch.zeros(x.numel() * x.element_size() + 512, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    copy = raw[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
    return copy.copy_(x)


def main() -> None:
    library = Library(Path(sys.argv[1]))
    sample, t = torch.randn(9, 4, 8, 8), torch.tensor([5.0, 7.0, 5.0, 5.0, 7.0, 5.0, 5.0, 5.0, 5.0])
    with tempfile.TemporaryDirectory() as folder, library.failing("compute"):
        plan_folder(Path(folder) / "unet")
        (Path(folder) / "unet" / "config.json").write_text(json.dumps(CONFIG))
        spec = EngineSpec(Path(folder), "unet", "f16", sha256="0")
        with (
            mock.patch.object(module, "require_gpu", return_value=ADA),
            mock.patch.object(module, "TorchCuda", HostCuda),
            mock.patch.object(module.TensorRTEngine, "device", "cpu"),
            # what is on the GPU is told apart by the device's type, which is the same here
            mock.patch("qdeploy.engines.tensorrt.execution.Execution._check"),
            module.TensorRTEngine(spec) as engine,
        ):
            assert isinstance(engine, Engine)
            assert {name: (p.dtype, p.shape) for name, p in engine.ports.items()} == {
                "sample": ("float32", (None, 4, 8, 8)),
                "timestep": ("float32", ()),
            }
            # the profile ends at 4: nine rows run in three parts, those of two timesteps apart
            assert torch.equal(engine({"sample": sample, "timestep": torch.tensor(5)}), sample)
            rows = [line for line in library.journal if line.startswith("Context.setInputShape sample")]
            assert rows == [f"Context.setInputShape sample {n}x4x8x8" for n in (4, 1)], rows
            assert torch.equal(engine({"sample": sample, "timestep": t}), sample)
            assert torch.equal(
                engine({"sample": sample.double(), "timestep": t[:1]}), sample.double().float()
            )
            first = engine({"sample": sample[:2], "timestep": t[0]})
            engine({"sample": -sample[:2], "timestep": t[0]})
            assert torch.equal(first, sample[:2])
            with pytest.raises(InvalidInputError, match="no input 'labels'"):
                engine({"sample": sample, "timestep": t, "labels": t})
            (kernel,) = engine.kernels({"sample": sample, "timestep": t})
            assert (kernel.layers, kernel.precision) == (("body.conv",), "int8")
            denoiser = engine.as_denoiser()
            assert torch.equal(denoiser(sample[:2], 5.0).sample, sample[:2])
            assert denoiser.device.type == "cpu"
        destroyed = [line for line in library.journal if line in ("~Context", "~Engine", "~Runtime")]
        assert destroyed[0] == "~Context"
        assert destroyed[-1] == "~Runtime"
    print("held")


if __name__ == "__main__":
    main()
