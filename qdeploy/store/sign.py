"""Sign an artifact, and find out who signed one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdeploy.store.artifact import Artifact, verified
from qdeploy.store.signature import Signature, new_keys, sign_manifest, verify_manifest
from qdeploy.system.errors import UsageError


def sign(artifact: str | Path | Artifact, key: str | Path, *, new_key: bool = False) -> Path:
    """Sign an artifact with Ed25519 (RFC 8032); it is verified first.

    Args:
        artifact: its folder. A signature that lies there is replaced.
        key: PEM file of the private key, as ``openssl genpkey -algorithm ed25519`` makes it, not encrypted.
        new_key: make the key first, and ``KEY.pub`` beside it for those who verify.

    Returns:
        The file of the signature, ``qdeploy.json.sig`` in the artifact's folder.

    Raises:
        InvalidInputError: the artifact is damaged.
        UsageError: the key cannot be used, or is there already and is to be made.
        CapabilityError: cryptography is not installed.
    """
    opened, key = verified(artifact), Path(key)
    if new_key:
        new_keys(key, key.with_name(f"{key.name}.pub"))
    return sign_manifest(opened.path, opened.manifest, key)


def verify(artifact: str | Path | Artifact, keys: Sequence[str | Path]) -> Signature:
    """Make sure that an artifact is as one of the keys' owners signed it: every file, without a network.

    Args:
        artifact: its folder.
        keys: PEM files of public keys.

    Raises:
        InvalidInputError: it is damaged, not signed, signed with another key, or was changed after that.
        UsageError: no key is given, or one cannot be used.
        CapabilityError: cryptography is not installed.
    """
    if not keys:
        raise UsageError("whose signature? name a public key")
    opened = verified(artifact)
    return verify_manifest(opened.path, opened.manifest, [Path(key) for key in keys])
