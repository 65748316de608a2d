"""The components of a pipeline, as its ``model_index.json`` lists them, and the identity of all but the denoiser.

An index may come from anywhere. A component's library and class are looked up in an allow-list: nothing that lies
in a model's folder is ever imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.store.artifact import INDEX as INDEX
from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.names import contained, entries, name_problem
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_files

if TYPE_CHECKING:
    from qdeploy.model.folder import Model

LIBRARIES = ("diffusers", "transformers")
# It is passed to diffusers as None, so that it has no influence on anything.
NEVER_LOADED = "safety_checker"
_READ = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True)
class Component:
    """A component of a pipeline.

    Attributes:
        folder: where it is.
        library: the package of its class.
        class_name: its class.
    """

    folder: Path
    library: str
    class_name: str

    def find_class(self) -> Any:
        """The component's class: one of diffusers or transformers that loads a network.

        Raises:
            InvalidInputError: it is none.
        """
        found = None
        if self.library in LIBRARIES and self.class_name.isidentifier():
            import torch

            library = import_module(self.library)
            found = getattr(library, self.class_name, None)
            if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
                found = None
        if found is None or not hasattr(found, "from_pretrained"):
            raise InvalidInputError(
                f"the component {self.folder} is a {self.class_name[:80]} of {self.library[:80]}: only networks of "
                f"{' and '.join(LIBRARIES)} are loaded"
            )
        return found


@dataclass(frozen=True)
class PipelineIndex:
    """What ``model_index.json`` says.

    Attributes:
        path: the pipeline's folder.
        class_name: the pipeline's diffusers class; None if it does not say.
        components: those that are not absent, by name.
    """

    path: Path
    class_name: str | None
    components: Mapping[str, Component]

    def others(self, denoiser: str) -> dict[str, Component]:
        """All components but the denoiser and the safety checker."""
        return {name: part for name, part in self.components.items() if name not in (denoiser, NEVER_LOADED)}


def read_index(path: Path) -> PipelineIndex | None:
    """The index of a pipeline's folder; None if it has none.

    Raises:
        InvalidInputError: it cannot be read, or a component has a name that no folder of a pipeline may have.
    """
    if not (path / INDEX).is_file():
        return None
    content = read_json_object(contained(path, INDEX))
    name = content.get("_class_name")
    components = {}
    for key, entry in content.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            if problem := name_problem(key):
                raise InvalidInputError(f"{path / INDEX} has a component {key[:80]!r}, whose name {problem}")
            components[key] = Component(path / key, *entry)
    return PipelineIndex(path, name if isinstance(name, str) else None, components)


def pipeline_sha256(model: Model) -> str:
    """Identity of a model's pipeline but for its denoiser: index, scheduler, tokenizers, encoders, autoencoder.

    Raises:
        InvalidInputError: a file leads out of the model's folder.
    """
    index = read_index(model.path)
    if index is None:
        return sha256_files({})
    names = [INDEX]
    for component in index.others(model.component):
        below = entries(model.path / component)
        names += [f"{component}/{name}" for name in below if Path(name).suffix in _READ]
    return sha256_files({name: contained(model.path, name) for name in names})


def files_of(path: Path, component: str) -> dict[str, Path]:
    """The files of a component, by name relative to the pipeline's folder.

    Raises:
        InvalidInputError: one leads out of the folder, or is no regular file.
    """
    names = [f"{component}/{name}" for name in entries(path / component)]
    return {name: contained(path, name) for name in names}
