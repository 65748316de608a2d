"""What this machine can do: the processor's name and the instructions that matter for int8 and bf16."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from qdeploy.system.errors import CapabilityError, UsageError

CPUINFO = Path("/proc/cpuinfo")

# Without one of these, int8 products take several instructions, and gain less over float32.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
# With one of these, x86 processors add int8 products in 32 bits.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")
# Bits of the sums that an engine's int8 products need, as stated in its facts.
NARROW, WIDE = 16, 32
# Those that OpenVINO has bf16 kernels for.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# Listed in reports, to distinguish machines.
_NAMED = ("avx2", "avx512f", *INT8_INSTRUCTIONS, *BF16_INSTRUCTIONS)


def _cpuinfo(*keys: str) -> str:
    """Value of the first line of ``/proc/cpuinfo`` that has one of the keys; empty without such a file."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def cpu_model() -> str:
    """The processor's name, as it reports it."""
    return _cpuinfo("model name", "Model", "Hardware") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that matter here, sorted; empty where they are unknown."""
    flags = set(_cpuinfo("flags", "Features").split())
    return sorted(flags.intersection(_NAMED))


def cpu_identity() -> dict[str, Any]:
    """What compiled code depends on: the processor's name and all of its feature flags."""
    return {"cpu": cpu_model(), "flags": sorted(set(_cpuinfo("flags", "Features").split()))}


def has_int8() -> bool:
    """Whether int8 products are faster than float32 ones here; True where they are unknown."""
    features = cpu_features()
    return not features or any(name in features for name in INT8_INSTRUCTIONS)


def int8_sums_saturate() -> bool:
    """Whether int8 kernels here add two products of unsigned by signed bytes in 16 bits, and saturate.

    x86 without VNNI does (``vpmaddubsw``): 255 x 127 twice is twice what fits. False where the
    instructions are unknown.
    """
    flags = set(_cpuinfo("flags").split())
    return bool(flags) and flags.isdisjoint(_WIDE_SUMS)


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 numbers."""
    return any(name in cpu_features() for name in BF16_INSTRUCTIONS)


def check_device(device: str) -> str:
    """The name of a device of torch's that tensors can be made on, as it is.

    Raises:
        UsageError: torch knows no such word.
        CapabilityError: this machine, or this build of torch, has none.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"there is no device {device!r}: cpu and cuda are such") from error
    if kind == torch._C._get_privateuse1_backend_name():  # a package of someone else's answers for its own
        return device
    try:
        torch.empty(0, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise CapabilityError(f"this machine, or this build of torch, has no device {kind!r}") from error
    return device


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, for the ``measured`` part of a manifest; with its GPU where ``device`` is ``cuda``."""
    found: dict[str, Any] = {"cpu": cpu_model(), "features": cpu_features(), "cores": usable_cores()}
    if device == "cuda":
        from qdeploy.system.gpu import find_gpu

        found["gpu"] = find_gpu().to_json()
    return found


def usable_cores() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
