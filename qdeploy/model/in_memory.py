"""Models that are loaded already: a diffusers pipeline or network in memory, in place of its folder.

Everything here goes by files and their hashes, so a model in memory has to be on disk. One that is unchanged since
it was loaded is taken from where it was loaded; any other is written to the cache, once for each content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union, runtime_checkable

from qdeploy.model.folder import Model, open_model, read_json
from qdeploy.model.pipeline_index import INDEX
from qdeploy.store.artifact import Artifact, is_artifact
from qdeploy.store.paths import cache_folder
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.progress import say

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class Loaded(Protocol):
    """A diffusers pipeline, or a network of diffusers."""

    config: Any

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write it to a folder."""


ModelSource: TypeAlias = Union[str, Path, Model, Loaded, "nn.Module"]


def model_of(source: ModelSource) -> Model:
    """The model on disk that a source means.

    Args:
        source: a folder, a bundled model's name, a Hub id, a `Model`, a loaded diffusers pipeline, or its network.

    Raises:
        InvalidInputError: there is no diffusers model.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, str | Path):
        return open_model(source)
    if not isinstance(source, Loaded) or not (
        hasattr(source, "components") or "_class_name" in source.config
    ):
        raise InvalidInputError(
            f"a {type(source).__name__} is no diffusers pipeline or network: give one, or the folder of a model"
        )
    return _unchanged(source) or _written(source)


def artifact_or_model(source: ModelSource | Artifact) -> Path | Model:
    """What a source means: the folder of an artifact, or else a model on disk.

    Raises:
        InvalidInputError: it is no artifact, and there is no diffusers model.
    """
    if isinstance(source, Artifact):
        return source.path
    if isinstance(source, str | Path) and is_artifact(Path(source)):
        return Path(source)
    return model_of(source)


def _unchanged(source: Loaded) -> Model | None:
    """The folder that a model was loaded from, if the model still is what the folder holds."""
    origin = Path(str(source.config.get("_name_or_path") or ""))
    if not source.config.get("_name_or_path") or not origin.is_dir():
        return None
    whole = (origin / INDEX).is_file()
    if whole != hasattr(source, "components"):
        return None
    if all(_equal(part, origin / name if name else origin) for name, part in _parts(source).items()):
        return open_model(origin)
    return None


def _parts(source: Any) -> dict[str, Any]:
    """Components of a pipeline by name; a network alone has no name."""
    components: Mapping[str, Any] = getattr(source, "components", None) or {"": source}
    return {name: part for name, part in components.items() if part is not None}


def _equal(part: Any, folder: Path) -> bool:
    """Whether a component has the configuration and the weights of a folder."""
    from safetensors.torch import load_file
    from torch import nn

    if not isinstance(part, nn.Module):
        file = folder / "scheduler_config.json"
        return not hasattr(part, "config") or (
            file.is_file() and _plain(part.config) == _plain(read_json(file))
        )
    state: Mapping[str, Any] = part.state_dict()
    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return state.keys() == found.keys() and all(
        tensor.shape == found[name].shape and bool((tensor.cpu() == found[name].to(tensor.dtype)).all())
        for name, tensor in state.items()
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers adds of itself."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def _written(source: Loaded) -> Model:
    folder = cache_folder() / "models" / _hash(source)
    if not folder.is_dir():
        say(f"the model in memory is written to {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            part = Path(scratch) / "model"
            source.save_pretrained(part)
            part.rename(folder)
    return open_model(folder)


def _hash(source: Loaded) -> str:
    from torch import nn

    digest = sha256()
    for name, part in sorted(_parts(source).items()):
        config = getattr(part, "config", {})
        config = _plain(config.to_dict() if hasattr(config, "to_dict") else dict(config))
        shown = (
            "" if isinstance(part, nn.Module) else repr(part)
        )  # of tokenizers: their vocabulary's size and tokens
        digest.update(
            json.dumps([name, type(part).__name__, config, shown], sort_keys=True, default=str).encode()
        )
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(_bytes()).numpy().tobytes())
    return digest.hexdigest()[:32]


def _bytes() -> Any:
    import torch

    return torch.uint8
