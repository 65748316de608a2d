"""Find a GPU that TensorRT can use, through the driver, before any TensorRT object exists.

TensorRT's objects must not be used without a driver: the runtime returns an object that looks valid and
crashes the process when the first property is read.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from qdeploy.system.errors import CapabilityError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUdevice_attribute and CUresult, from the CUDA driver API's documentation.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_REASONS = {
    100: "the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    101: "that GPU does not exist: check CUDA_VISIBLE_DEVICES",
    803: "the driver's library and kernel module differ in version: restart the machine after the update",
    804: "the CUDA compatibility package does not support this GPU: update the driver",
}
# TensorRT for CUDA 13 needs the R580 drivers, that for CUDA 12 the R525 ones.
TENSORRT_PACKAGES: Mapping[str, int] = {"tensorrt_cu13_libs": 13, "tensorrt_cu12_libs": 12}
_DRIVERS = {13: "580", 12: "525"}
# The oldest tensor cores that multiply int8 are Turing's; TensorRT 10 and 11 support nothing older well.
OLDEST_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    Attributes:
        name: the product's name.
        capability: compute capability, such as (8, 9).
        memory: bytes.
        cuda: the newest CUDA that the driver runs, such as 13000.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    cuda: int

    @property
    def sm(self) -> int:
        """Compute capability as one number, such as 89."""
        return 10 * self.capability[0] + self.capability[1]

    def to_json(self) -> dict[str, Any]:
        """For manifests and reports."""
        return asdict(self) | {"capability": f"{self.capability[0]}.{self.capability[1]}"}


def find_gpu(index: int = 0, library: str = LIBRARY) -> Gpu:
    """Ask the CUDA driver for a GPU.

    Args:
        index: which of the visible ones.
        library: file name of the driver's library.

    Raises:
        CapabilityError: no driver, no GPU, or one that TensorRT cannot use.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise CapabilityError(
            f"TensorRT needs an NVIDIA GPU and its driver, but {library} is not on this machine: install the "
            "driver, or start the container with --gpus all"
        ) from error
    _check(cuda.cuInit(0), "start")
    number = ctypes.c_int()
    _check(cuda.cuDriverGetVersion(ctypes.byref(number)), "report its version")
    version = number.value
    _check(cuda.cuDeviceGetCount(ctypes.byref(number)), "count GPUs")
    if number.value <= index:
        _check(100 if index == 0 else 101, "find a GPU")
    device = ctypes.c_int()
    _check(cuda.cuDeviceGet(ctypes.byref(device), index), "open the GPU")
    name = ctypes.create_string_buffer(256)
    _check(cuda.cuDeviceGetName(name, len(name), device), "name the GPU")
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        _check(cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "describe the GPU")
        capability.append(number.value)
    memory = ctypes.c_size_t()
    _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "report the GPU's memory")
    gpu = Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value, version)
    if gpu.capability < OLDEST_CAPABILITY:
        raise CapabilityError(
            f"the {gpu.name} has compute capability {gpu.sm / 10}, but int8 needs 7.5 (Turing) or newer"
        )
    return gpu


def _check(result: int, what: str) -> None:
    if result != 0:
        reason = _REASONS.get(result, f"CUDA error {result}: does nvidia-smi work?")
        raise CapabilityError(f"the NVIDIA driver cannot {what}: {reason}")


def required_cuda(packages: Mapping[str, int] = TENSORRT_PACKAGES) -> int | None:
    """Major version of CUDA that the installed TensorRT libraries were made for; None if unknown.

    Args:
        packages: the major version by the name of the package that brings the libraries.
    """
    for package, major in packages.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return major
    return None


def require_gpu(library: str = LIBRARY, packages: Mapping[str, int] = TENSORRT_PACKAGES) -> Gpu:
    """The first GPU, its driver new enough for the installed TensorRT.

    Args:
        library: file name of the driver's library.
        packages: see `required_cuda`.

    Raises:
        CapabilityError: see `find_gpu`; or the driver is too old.
    """
    gpu, needed = find_gpu(library=library), required_cuda(packages)
    if needed is not None and gpu.cuda < 1000 * needed:
        raise CapabilityError(
            f"the installed TensorRT is made for CUDA {needed}, but the driver runs CUDA "
            f"{gpu.cuda // 1000}.{gpu.cuda % 1000 // 10} at most: update the driver to "
            f"{_DRIVERS[needed]} or newer"
        )
    return gpu
