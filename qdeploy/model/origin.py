"""Which model an artifact was made from: one way to find it, and to make sure that it still is the same."""

from __future__ import annotations

from qdeploy.model.folder import Model, open_if_there
from qdeploy.model.in_memory import ModelSource, model_of
from qdeploy.store.artifact import DenoiserArtifact
from qdeploy.system.errors import InvalidInputError


def source_model(artifact: DenoiserArtifact, reference: ModelSource | None = None) -> Model:
    """The full-precision model that a checkpoint, a bundle or an engine was made from.

    Args:
        artifact: what was made.
        reference: the model, or where it is; by default where it was when the artifact was made.

    Raises:
        InvalidInputError: it is not there, or is another one.
    """
    if reference is not None:
        model = model_of(reference)
        if model.sha256 != artifact.facts.model_sha256:
            raise InvalidInputError(
                f"{artifact.path} was not made from {model.path}: name the full-precision model that it was "
                "made from"
            )
        return model
    if found := find_source_model(artifact):
        return found
    raise InvalidInputError(
        f"the full-precision model that {artifact.path} was made from is not at "
        f"{artifact.source or 'a known place'} any more: name its folder with --reference"
    )


def find_source_model(artifact: DenoiserArtifact) -> Model | None:
    """The model that an artifact was made from, if it is still where it was, and the same."""
    try:
        model = open_if_there(artifact.source)
        return model if model and model.sha256 == artifact.facts.model_sha256 else None
    except InvalidInputError:
        return None
