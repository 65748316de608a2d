"""The TensorRT module, and which of its versions can do what: asked of the module, never assumed.

TensorRT 10.8 and later and 11.x are supported, and TensorRT for RTX from 1.5 on. Between TensorRT 10 and 11, every
precision flag went away: types come from the ONNX graph alone. What a version lacks is found with ``hasattr`` and
refused in a sentence.
"""

from __future__ import annotations

import importlib
from typing import Any

from qdeploy.engines.tensorrt.flavour import TENSORRT, Flavour
from qdeploy.system.errors import CapabilityError


def load_tensorrt(flavour: Flavour = TENSORRT) -> Any:
    """The module of a library. For `TENSORRT`, make sure of a GPU first, by `qdeploy.system.gpu`.

    Raises:
        CapabilityError: it is missing, broken or too old.
    """
    try:
        trt = importlib.import_module(flavour.module)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise CapabilityError(f"{flavour.title} cannot be imported ({reason}): {flavour.install}") from error
    if not hasattr(trt, "__version__"):  # a folder of that name lies in the way
        raise CapabilityError(f"{flavour.title} is not installed: {flavour.install}")
    if version_of(trt)[: len(flavour.oldest)] < flavour.oldest:
        oldest = ".".join(map(str, flavour.oldest))
        raise CapabilityError(
            f"{flavour.title} {trt.__version__} is too old, {oldest} or newer is needed: {flavour.install}"
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
    """Flags for ``create_network``: strongly typed networks, which are the default of 11 and an option of 10."""
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
