"""Whom `benchmarks/cpu.py` lets compete: a family per file, each with a dictionary ``CONTENDERS`` by name.

To add one, write a file with such a dictionary and list it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.system.machine import BF16_INSTRUCTIONS, has_bf16

FAMILIES = ("torch_eager", "openvino_float", "nncf_int8", "onnxruntime_int8", "modelopt_int8", "ours")
PRECISIONS = ("f32", "bf16")

Call = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """What all contenders are given: the same network and the same calibration rows.

    Attributes:
        shape: name of the network's shape.
        folder: where everything that is prepared lies.
        model: the diffusers folder.
        threads: threads of each runtime.
        modelopt: a Python that has ModelOpt; None if there is none.
        ranges: qdeploy's finder of ranges: ``lp``, of least error; or ``minmax``, which takes a hundredth of the
            time.
    """

    shape: str
    folder: Path
    model: Path
    threads: int
    modelopt: str | None = None
    ranges: str = "lp"

    @property
    def onnx(self) -> Path:
        """The full-precision graph."""
        return next((self.folder / "fp32-onnx").glob("*/model.onnx"))

    def rows(self) -> dict[str, Tensor]:
        """The calibration rows, ``[rows, ...]`` each."""
        from qdeploy.calibration_set.dataset import CalibrationSet

        data = CalibrationSet.open(self.folder / "set")
        return dict(data.inputs(torch.arange(len(data))))

    def feeds(self) -> list[dict[str, Any]]:
        """The calibration rows one by one, as the full-precision graph takes them."""
        rows = self.rows()
        count = len(rows["timestep"])
        return [
            {
                name: x[i].float().numpy().reshape(()) if name == "timestep" else x[i : i + 1].numpy()
                for name, x in rows.items()
            }
            for i in range(count)
        ]


@dataclass
class Loaded:
    """A contender that is ready to be called.

    Attributes:
        call: the network.
        ir: the OpenVINO model, for those that run on it.
        precision: what OpenVINO computes floats in.
    """

    call: Call
    ir: Path | None = None
    precision: str = "f32"


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        name: for the tables.
        load: opens what was prepared.
        prepare: quantizes and writes files, unless they are there; returns why not, if it cannot.
        files: what its engine consists of, relative to the case's folder.
        floating: whether nothing is quantized.
        precision: what floats are computed in: ``f32`` or ``bf16``.
    """

    name: str
    load: Callable[[Case], Loaded]
    prepare: Callable[[Case], str | None] | None = None
    files: tuple[str, ...] = ()
    floating: bool = False
    precision: str = "f32"

    @property
    def obstacle(self) -> str | None:
        """Why this machine cannot run it, if it cannot: software bf16 is no contender."""
        if self.precision == "bf16" and not has_bf16():
            return f"this processor has no bf16 instructions ({' or '.join(BF16_INSTRUCTIONS)})"
        return None


def contenders() -> dict[str, Contender]:
    """All contenders by name."""
    found: dict[str, Contender] = {}
    for family in FAMILIES:
        found.update(import_module(f"benchmarks.contenders.{family}").CONTENDERS)
    return found
