"""Artifacts on the Hugging Face Hub: one repository each, verified by the same hashes as on a disk.

Access tokens, endpoint and cache are those of ``huggingface_hub``: ``hf auth login``, ``HF_ENDPOINT``, ``HF_HOME``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qdeploy.store.artifact import Artifact, is_artifact, open_artifact
from qdeploy.store.manifest import MANIFEST, SIGNATURE
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    artifact: str | Path | Artifact,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Upload an artifact to a repository of the Hub, which is made if it is not there.

    Files that the repository has and the artifact lacks are removed, so that it holds the artifact and nothing else.

    Args:
        artifact: verified before anything is sent.
        repository: ``owner/name``.
        revision: a branch, which is made if it is not there; ``main`` by default.
        private: make a new repository private.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        UsageError: ``repository`` is no ``owner/name``.
        InvalidInputError: it is no artifact, or damaged.
        CapabilityError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if not _ID.fullmatch(repository):
        raise UsageError(f"a repository of the Hub is called owner/name, not {repository!r}")
    opened = open_artifact(artifact)
    api: Any = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=opened.path,
            revision=revision,
            commit_message=message or f"qdeploy: {opened.kind} {opened.sha256[:12]}",
            allow_patterns=[*opened.files, MANIFEST, SIGNATURE],
            delete_patterns="*",
        )
    except Exception as error:
        raise CapabilityError(f"{repository} cannot be written on the Hub: {_first_line(error)}") from error
    return str(commit.commit_url)


def local_artifact(source: str | Path | Artifact) -> str | Path | Artifact:
    """Where an artifact lies on this machine; one that is named by its Hub id is downloaded.

    Args:
        source: an artifact, a folder, or ``owner/name``, with ``@REVISION`` behind it for another one than ``main``.

    Returns:
        The folder of the download; ``source`` itself where it is a folder, or no Hub id.

    Raises:
        InvalidInputError: the Hub has no such repository, or it holds no artifact of qdeploy's.
    """
    if isinstance(source, Artifact) or Path(source).exists():
        return source
    name, _, revision = str(source).partition("@")
    if not _ID.fullmatch(name):
        return source
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision or None))
    except Exception as error:
        raise InvalidInputError(
            f"{source} does not exist, and cannot be had from the Hub: {_first_line(error)}"
        ) from error
    if not is_artifact(folder):
        raise InvalidInputError(f"{name} on the Hub holds no artifact of qdeploy's: it has no qdeploy.json")
    return folder


def is_on_hub(source: str | Path) -> bool:
    """Whether a name is that of a repository on the Hub, or of one in its cache, that holds an artifact."""
    name, _, revision = str(source).partition("@")
    if Path(source).exists() or not _ID.fullmatch(name):
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, MANIFEST, revision=revision or None)
    except Exception:  # no such repository, no such file in it, or no network
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
