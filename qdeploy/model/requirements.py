"""Optional packages that the components of a pipeline come from.

Without transformers, diffusers puts a placeholder in the place of every pipeline with a text encoder, whose
signature says nothing of what the pipeline takes. So the packages are checked before a pipeline is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from qdeploy.system.errors import CapabilityError

# Library of a component in model_index.json -> the extra of this package that installs it.
EXTRAS = {"transformers": "sd", "sentencepiece": "sd", "torchsde": "schedulers"}


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def advise(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install 'qdeploy[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def require_libraries(index: Mapping[str, Any], where: object) -> None:
    """Make sure that the libraries of a pipeline's components are installed.

    Args:
        index: the content of ``model_index.json``.
        where: the pipeline's folder, for the message.

    Raises:
        CapabilityError: one is missing.
    """
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library in EXTRAS and not is_installed(library):
            raise CapabilityError(
                f"the {name} of {where} needs the package {library}: {advise(library)}",
            )
