from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdeploy.engines.registry import backends
from qdeploy.engines.tensorrt.smi import FIELDS, gpu_state
from qdeploy.system.errors import CapabilityError
from tests.engines.tensorrt.stand_in import ROOT


def program(folder: Path, answer: str, code: int = 0) -> str:
    path = folder / "smi"
    path.write_text(f"#!/bin/sh\necho \"$@\" > {folder}/asked\nprintf '{answer}\\n'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_numbers_come_back_by_name(tmp_path: Path) -> None:
    state = gpu_state(2, program(tmp_path, "1980, 2100, 2619, 41, 310.5, [N/A], 1024, 97"))
    assert state == {
        "sm_mhz": 1980, "sm_max_mhz": 2100, "memory_mhz": 2619, "celsius": 41, "watts": 310.5,
        "watts_limit": None, "used_mib": 1024, "busy_percent": 97,
    }  # fmt: skip
    asked = (tmp_path / "asked").read_text()
    assert "--id=2" in asked
    assert all(field in asked for field in FIELDS.values())


@pytest.mark.parametrize(("answer", "code"), [("No devices were found", 6), ("1, 2", 0), ("", 0)])
def test_anything_else_is_a_sentence(tmp_path: Path, answer: str, code: int) -> None:
    with pytest.raises(CapabilityError):
        gpu_state(program=program(tmp_path, answer, code))
    with pytest.raises(CapabilityError, match="is the driver installed"):
        gpu_state(program=str(tmp_path / "nothing"))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_benchmark_ends_with_code_4_and_one_sentence_without_a_gpu(backend: str, tmp_path: Path) -> None:
    if backends()[backend].available():
        pytest.skip("this machine has a GPU")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "tensorrt_sampling.py"),
        "model",
        "onnx",
        "-o",
        "out",
        "--backend",
        backend,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_the_gpu_of_this_machine_tells() -> None:
    assert gpu_state()["used_mib"] is not None
