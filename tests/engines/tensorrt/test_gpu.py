"""The question for a GPU, asked of a driver that is compiled here, and of none."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from qdeploy.system import gpu as preflight
from qdeploy.system.errors import CapabilityError
from qdeploy.system.gpu import find_gpu, require_gpu

DRIVER = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Test GPU", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? MAJOR : MINOR;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)24 << 30; return 0; }
"""
Driver = Callable[..., str]


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def make(**values: int) -> str:
        values = {"INIT": 0, "VERSION": 13000, "COUNT": 1, "MAJOR": 8, "MINOR": 9} | values
        source, library = tmp_path / "cuda.c", tmp_path / f"libcuda{abs(hash(str(values)))}.so"
        source.write_text(DRIVER)
        defines = [f"-D{name}={value}" for name, value in values.items()]
        subprocess.run([compiler, "-shared", "-fPIC", *defines, str(source), "-o", str(library)], check=True)
        return str(library)

    return make


def test_the_driver_describes_the_gpu(driver: Driver) -> None:
    gpu = find_gpu(library=driver())
    assert (gpu.name, gpu.capability, gpu.sm, gpu.cuda, gpu.memory) == (
        "Test GPU", (8, 9), 89, 13000, 24 * 2**30,
    )  # fmt: skip
    assert gpu.to_json()["capability"] == "8.9"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"INIT": 100}, "sees no GPU"),
        ({"INIT": 803}, "restart the machine"),
        ({"INIT": 999}, "CUDA error 999"),
        ({"COUNT": 0}, "CUDA_VISIBLE_DEVICES"),
        ({"MAJOR": 6, "MINOR": 1}, "capability 6.1"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(driver: Driver, values: dict[str, int], words: str) -> None:
    with pytest.raises(CapabilityError, match=words) as error:
        find_gpu(library=driver(**values))
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)


def test_a_gpu_that_does_not_exist_is_refused(driver: Driver) -> None:
    with pytest.raises(CapabilityError, match="does not exist"):
        find_gpu(3, library=driver())


def test_an_old_driver_is_refused_for_the_installed_libraries(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "required_cuda", lambda packages: 13)
    with pytest.raises(CapabilityError, match=r"CUDA 12\.4 at most: update the driver to 580"):
        require_gpu(driver(VERSION=12040))
    assert require_gpu(driver(VERSION=13010)).cuda == 13010
    monkeypatch.setattr(preflight, "required_cuda", lambda packages: None)
    assert require_gpu(driver(VERSION=12040)).cuda == 12040


def test_without_a_driver_there_is_one_sentence() -> None:
    with pytest.raises(CapabilityError, match=r"libnothing\.so is not on this machine: install the driver"):
        find_gpu(library="libnothing.so")


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="this machine has a driver")
def test_the_command_line_stops_before_tensorrt(
    qdeploy: Callable[..., Result], quantized_bundle: object
) -> None:
    path = quantized_bundle.path  # type: ignore[attr-defined]
    result = qdeploy("build-engine", path, "--backend", "tensorrt", "-o", path.parent / "never")
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert "NVIDIA GPU and its driver" in result.stderr
    assert not (path.parent / "never").exists()


def test_importing_the_backend_imports_nothing_heavy() -> None:
    program = (
        "import sys; import qdeploy.engines.tensorrt, qdeploy.engines.tensorrt.builder, "
        "qdeploy.engines.tensorrt.engine; "
        "print([m for m in ('tensorrt', 'torch', 'numpy', 'onnx', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
