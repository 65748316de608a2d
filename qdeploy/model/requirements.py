"""Optional packages that the components of a pipeline come from.

Without transformers, diffusers puts a placeholder in the place of every pipeline with a text encoder, whose
signature says nothing of what the pipeline takes. So the packages are checked before a pipeline is looked at.
"""

from __future__ import annotations

from importlib.util import find_spec

from qdeploy.model.pipeline_index import PipelineIndex
from qdeploy.system.errors import CapabilityError

# Library of a component in model_index.json -> the extra of this package that installs it.
EXTRAS = {"transformers": "sd", "sentencepiece": "sd", "torchsde": "schedulers"}


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def advise(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install 'qdeploy[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def require_libraries(index: PipelineIndex) -> None:
    """Make sure that the libraries of a pipeline's components are installed.

    Args:
        index: of the pipeline.

    Raises:
        CapabilityError: one is missing.
    """
    for name, component in index.components.items():
        library = component.library
        if library in EXTRAS and not is_installed(library):
            raise CapabilityError(
                f"the {name} of {index.path} needs the package {library}: {advise(library)}",
            )
