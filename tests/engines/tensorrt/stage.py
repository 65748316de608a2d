"""What scenes share: the library, a scratch folder, and short ways to open and call.

Runs beside the stand-in alone, where ``tensorrt`` is the shim before the real bindings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tensorrt as trt

from qdeploy.engines.tensorrt import plan as plans
from qdeploy.engines.tensorrt.execution import Execution
from qdeploy.system.errors import QDeployError
from tests.engines.tensorrt.bench import ADA, FakeCuda, Library, plan_folder


class Scratch:
    """A folder that is a new one for each scene."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name


library = Library(Path(os.environ["STAND_IN"]))
scratch = Scratch()


def refused(call: Callable[[], object], *words: str, code: int = 5) -> None:
    """The call ends in one of our errors, which says so; never in a crash or another exception."""
    with pytest.raises(QDeployError) as caught:
        call()
    assert caught.value.exit_code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def in_order(*parts: str, journal: Sequence[str] | None = None) -> None:
    """Lines that begin so occur in this order."""
    lines = iter(library.journal if journal is None else journal)
    for part in parts:
        assert any(line.startswith(part) for line in lines), (
            f"{part!r} is missing or too early: {library.journal}"
        )


def opened(failure: str = "", **change: Any) -> plans.Plan:
    with library.failing(failure):
        return plans.open_plan(trt, plan_folder(scratch / "plan", **change), ADA)


def execution(
    failure: str = "", graphs: bool = False, cuda: FakeCuda | None = None, **change: Any
) -> Execution:
    plan = opened(**change)
    with library.failing(failure):
        return Execution(trt, plan, cuda or FakeCuda(), graphs=graphs)
