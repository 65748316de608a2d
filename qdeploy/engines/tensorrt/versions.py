"""The TensorRT module, and which of its versions can do what: asked of the module, never assumed.

10.8 and later and 11.x are supported. Between the two, every precision flag went away: types come from the
ONNX graph alone. What a version lacks is found with ``hasattr`` and refused in a sentence.
"""

from __future__ import annotations

import importlib
from typing import Any

from qdeploy.system.errors import CapabilityError

OLDEST = (10, 8)
INSTALL = "pip install 'qdeploy[tensorrt]'"


def load_tensorrt() -> Any:
    """The module ``tensorrt``. Make sure of a GPU first, by `qdeploy.system.gpu`.

    Raises:
        CapabilityError: it is missing, broken or too old.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise CapabilityError(f"TensorRT cannot be imported ({reason}): {INSTALL}") from error
    if not hasattr(trt, "__version__"):  # a folder of that name lies in the way
        raise CapabilityError(f"TensorRT is not installed: {INSTALL}")
    if version_of(trt)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise CapabilityError(
            f"TensorRT {trt.__version__} is too old, {oldest} or newer is needed: {INSTALL}"
        )
    return trt


def version_of(trt: Any) -> tuple[int, ...]:
    """The version as numbers, such as (11, 4, 0, 106)."""
    return numbers(str(trt.__version__))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version string."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def creation_flags(trt: Any) -> int:
    """Flags for ``create_network``: strongly typed, which 11 always is and 10 has to be told."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def member(trt: Any, enum: str, name: str) -> Any:
    """A member of one of TensorRT's enumerations.

    Raises:
        CapabilityError: this version does not have it.
    """
    found = getattr(getattr(trt, enum, None), name, None)
    if found is None:
        raise CapabilityError(
            f"TensorRT {trt.__version__} has no {enum}.{name}: leave out the option that needs it, or install "
            "another version"
        )
    return found


def first(thing: Any, *names: str) -> Any:
    """The first attribute of these names that a version has; None without any."""
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), None)
