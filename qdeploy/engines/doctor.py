"""The verb ``doctor``: what this machine can build and run, and how to get what is missing."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from qdeploy.engines.registry import Backend, backends
from qdeploy.model.requirements import advise, is_installed
from qdeploy.system.errors import CapabilityError, UsageError
from qdeploy.system.machine import (
    BF16_INSTRUCTIONS,
    INT8_INSTRUCTIONS,
    cpu_features,
    has_bf16,
    has_int8,
    machine,
)
from qdeploy.system.suggest import unknown
from qdeploy.version import __version__

# Packages whose versions decide what works, by their names in pip.
PACKAGES = (
    "torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt",
    "tensorrt-cu13-bindings", "tensorrt-rtx", "polygraphy", "transformers", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        machine: processor, its features, cores, memory, system, Python.
        gpu: the GPU as its driver reports it, or the reason why none can be used.
        versions: of the packages that matter; None where one is not installed.
        backends: by name ``usable``, ``version``, ``precisions``, and ``problem`` where it is not usable.
        advice: sentences, one for each thing that could be better.
    """

    machine: dict[str, Any]
    gpu: dict[str, Any]
    versions: dict[str, str | None]
    backends: dict[str, dict[str, Any]]
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``qdeploy doctor --json``."""
        return {
            "qdeploy": __version__,
            "machine": self.machine,
            "gpu": self.gpu,
            "versions": self.versions,
            "backends": self.backends,
            "advice": self.advice,
        }

    def as_text(self) -> str:
        """The diagnosis for people."""
        where = self.machine
        lines = [
            f"qdeploy {__version__}, Python {where['python']}, {where['system']}",
            f"processor: {where['cpu']}, {where['cores']} cores ({', '.join(where['features']) or 'unknown'})",
            f"GPU: {self.gpu.get('name') or 'none usable'}",
            "",
        ]
        for name, found in self.backends.items():
            state = (
                f"{found['version']}, {' or '.join(found['precisions'])}"
                if found["usable"]
                else found["problem"]
            )
            lines.append(f"{'ok ' if found['usable'] else '-- '} {name}: {state}")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return "\n".join([*lines, "", f"packages: {versions}", *(f"advice: {line}" for line in self.advice)])


def doctor(require: str | None = None) -> Diagnosis:
    """Look at the machine.

    Args:
        require: name of a backend that has to be usable.

    Raises:
        UsageError: there is no such backend.
        CapabilityError: it is not usable; the message states the reason and the remedy.
    """
    if require is not None:
        if require not in backends():
            raise UsageError(unknown("backend", require, backends()))
        backends()[require].require()
    gpu = _gpu()
    return Diagnosis(
        machine=machine() | {"system": platform.platform(), "python": platform.python_version()},
        gpu=gpu,
        versions={name: installed_version(name) for name in PACKAGES},
        backends={name: _backend(backend) for name, backend in backends().items()},
        advice=advice_for(gpu),
    )


def _backend(backend: Backend) -> dict[str, Any]:
    try:
        backend.require()
        version = backend.version()
    except CapabilityError as error:
        return {"usable": False, "device": backend.device, "problem": str(error)}
    except Exception as error:  # a broken installation can fail in any way
        problem = f"the package {backend.package} is installed but fails: {str(error).splitlines()[0]}"
        return {"usable": False, "device": backend.device, "problem": problem}
    precisions = [p for p in backend.precisions if p != "bf16" or backend.device != "cpu" or has_bf16()]
    return {"usable": True, "device": backend.device, "version": version, "precisions": precisions}


def _gpu() -> dict[str, Any]:
    from qdeploy.system.gpu import find_gpu

    try:
        return find_gpu().to_json()
    except CapabilityError as error:
        return {"name": None, "problem": str(error)}


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def advice_for(gpu: dict[str, Any]) -> list[str]:
    """What would make engines faster or possible on this machine, a sentence each.

    Args:
        gpu: see `Gpu.to_json`; its ``name`` is None where there is none.
    """
    advice = []
    if cpu_features() and not has_int8():
        advice.append(
            f"this processor has none of {', '.join(INT8_INSTRUCTIONS)}: int8 gains less on it, and on x86 only "
            "layers with weights of 7 bits and fewer run in int8 (--weights int7)"
        )
    if cpu_features() and not has_bf16():
        advice.append(f"this processor has none of {', '.join(BF16_INSTRUCTIONS)}: engines compute in f32")
    if gpu["name"] is not None and not backends()["tensorrt"].installed():
        advice.append("this GPU could run TensorRT engines: pip install 'qdeploy[tensorrt]'")
    if gpu["name"] is not None and "+cpu" in (installed_version("torch") or ""):
        advice.append("this torch is built without CUDA: install the build for this driver from pytorch.org")
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        advice.append(
            "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, install one of them"
        )
    if not is_installed("transformers"):
        advice.append(f"text-to-image pipelines need transformers: {advise('transformers')}")
    if sys.platform != "linux":
        advice.append("qdeploy is tested on Linux only")
    return advice
