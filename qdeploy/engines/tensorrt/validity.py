"""Whether a plan of TensorRT for RTX can run here, asked of the library before it loads the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdeploy.system.errors import CapabilityError, InvalidInputError
from qdeploy.system.progress import say

# Reasons by the names of ``trt.EngineInvalidityDiagnostics``, a set of bits.
_DAMAGED = {
    "MALFORMED_ENGINE": "is damaged or no plan of this library: build the engine again",
}
_UNABLE = {
    "VERSION_MISMATCH": "was built by another version of the library: build the engine again",
    "UNSUPPORTED_CC": "was not built for this GPU: build the engine with another --gpu",
    "OLD_CUDA_DRIVER": "needs a newer driver: update the NVIDIA driver",
    "OLD_CUDA_RUNTIME": "needs a newer CUDA runtime: update the library's packages",
    "INSUFFICIENT_GPU_MEMORY": "does not fit into the memory of this GPU: build with smaller --shapes",
    "CUDA_ERROR": "cannot be checked, because CUDA does not start: does nvidia-smi work?",
}


def check_validity(trt: Any, runtime: Any, content: bytes, file: Path) -> None:
    """Refuse a plan that the library calls invalid; say so where it calls it slow.

    Args:
        trt: the module.
        runtime: its runtime.
        content: the plan.
        file: where it lies, for the message.

    Raises:
        InvalidInputError: the plan is damaged.
        CapabilityError: it cannot run on this machine.
    """
    validity, diagnostics = runtime.get_engine_validity(content)
    named = reasons(trt, int(diagnostics))
    if validity == trt.EngineValidity.VALID:
        return
    if validity == trt.EngineValidity.SUBOPTIMAL:
        say(
            f"warning: {file} runs, but slower than it could: {'; '.join(named) or 'the library gives no reason'}"
        )
        return
    damaged = int(diagnostics) & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    sentence = (
        f"{file} {named[0] if named else 'cannot be loaded, and the library gives no reason: build it again'}"
    )
    raise InvalidInputError(sentence) if damaged else CapabilityError(sentence)


def reasons(trt: Any, diagnostics: int) -> list[str]:
    """The sentences for a set of diagnostic bits, faults of the file first."""
    bits = trt.EngineInvalidityDiagnostics
    known = _DAMAGED | _UNABLE
    return [
        why for name, why in known.items() if hasattr(bits, name) and diagnostics & int(getattr(bits, name))
    ]
