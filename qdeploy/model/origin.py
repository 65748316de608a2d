"""The model that an artifact was made from."""

from __future__ import annotations

from pathlib import Path

from qdeploy.model.folder import Model, open_if_there, open_model
from qdeploy.store.artifact import Artifact
from qdeploy.system.errors import InvalidInputError


def source_model(engine: Artifact, reference: str | Path | Model | None = None) -> Model:
    """The full-precision model that an engine was made from.

    Args:
        engine: the engine.
        reference: where the model is; by default where it was when the engine was made.

    Raises:
        InvalidInputError: it is not there, or is another one.
    """
    wanted = engine.facts.get("model_sha256")
    if reference is not None:
        model = reference if isinstance(reference, Model) else open_model(reference)
        if model.sha256 != wanted:
            raise InvalidInputError(
                f"{engine.path} was not made from {model.path}: name the full-precision model that it was "
                "made from"
            )
        return model
    noted = engine.manifest["notes"].get("source")
    found = open_if_there(noted)
    if found is not None and found.sha256 == wanted:
        return found
    raise InvalidInputError(
        f"the full-precision model that {engine.path} was made from is not at {noted or 'a known place'} any "
        "more: name its folder with --reference"
    )
