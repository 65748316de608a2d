"""Models from the Hub."""

from __future__ import annotations

from pathlib import Path

from qdeploy.model.zoo import NAMES, zoo_models
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.suggest import did_you_mean


def download(source: str, variant: str | None) -> Path:
    """The local copy of a model of the Hub.

    Args:
        source: ``owner/name``.
        variant: of the weight files; None for the plain ones.

    Raises:
        InvalidInputError: this is no Hub id, or the Hub does not give it.
    """
    if source.count("/") != 1 or source.startswith((".", "/")):
        bundled = zoo_models() or NAMES
        raise InvalidInputError(
            f"{source} does not exist{did_you_mean(source, bundled)}: it is neither a local folder, a bundled model "
            f"({', '.join(bundled)}), nor a Hub id (owner/name)"
        )
    import diffusers

    try:
        return Path(diffusers.DiffusionPipeline.download(source, use_safetensors=True, variant=variant))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(
            f"{source} does not exist, and cannot be had from the Hub: {first}"
        ) from error
