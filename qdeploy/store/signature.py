"""Signatures of artifacts: Ed25519 (RFC 8032) over the hash of the whole manifest, with keys of the user's own.

A manifest holds the hash of every file, so that one signature stands for all of them. It lies beside the manifest as
``qdeploy.json.sig``, a JSON object with the public key and the signature in base64, and is no part of the artifact's
identity. Nothing is asked of any server. Keys are PEM files as OpenSSL writes and reads them.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.files import write_json
from qdeploy.store.manifest import SIGNATURE, Manifest, typed
from qdeploy.store.names import contained
from qdeploy.system.errors import CapabilityError, InvalidInputError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

REQUIRED = "QDEPLOY_REQUIRE_SIGNATURE"
_LARGEST = 2**16  # bytes of a key or a signature
_demanded: list[Path] = []


class _SignatureFile(Struct, frozen=True, forbid_unknown_fields=True):
    algorithm: str
    key: str
    signature: str


@dataclass(frozen=True)
class Signature:
    """A signature that was found to be right.

    Attributes:
        key: the public key's file.
        sha256: identity of the artifact.
    """

    key: Path
    sha256: str


def new_keys(private: Path, public: Path) -> None:
    """Make a pair of keys. The private one is readable by this user alone, and not encrypted.

    Raises:
        UsageError: one of the files is there already, or cannot be written.
        CapabilityError: cryptography is not installed.
    """
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for path, content, mode in ((private, secret, 0o600), (public, shown, 0o644)):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
        except OSError as error:
            raise UsageError(f"the key {path} cannot be written: {error.strerror}") from error


def sign_manifest(folder: Path, manifest: Manifest, key: Path) -> Path:
    """Sign an artifact that was verified, in place of a signature that is there.

    Args:
        folder: of the artifact.
        manifest: its.
        key: PEM file of an Ed25519 private key.

    Raises:
        UsageError: the key cannot be used.
        CapabilityError: cryptography is not installed.
    """
    serialization, _ = _library()
    private: Ed25519PrivateKey = _key(key, private=True)
    raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    write_json(
        folder / SIGNATURE,
        {
            "algorithm": "ed25519",
            "key": base64.b64encode(raw).decode(),
            "signature": base64.b64encode(private.sign(_message(manifest))).decode(),
        },
    )
    return folder / SIGNATURE


def verify_manifest(folder: Path, manifest: Manifest, keys: Sequence[Path]) -> Signature:
    """Make sure that one of the keys' owners signed what a manifest says.

    Raises:
        InvalidInputError: there is no signature, it is another one's, or it is of another manifest.
        UsageError: a key cannot be used.
        CapabilityError: cryptography is not installed.
    """
    serialization, _ = _library()
    known: dict[bytes, tuple[Path, Ed25519PublicKey]] = {}
    for path in keys:
        key: Ed25519PublicKey = _key(path, private=False)
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        known[raw] = path, key
    if not (folder / SIGNATURE).exists():
        raise InvalidInputError(f"{folder} is not signed: its owner can with `qdeploy sign`")
    stored = typed(read_json_object(contained(folder, SIGNATURE), _LARGEST), _SignatureFile, folder)
    try:
        raw, signature = (base64.b64decode(text, validate=True) for text in (stored.key, stored.signature))
    except ValueError as error:
        raise InvalidInputError(f"{folder / SIGNATURE} is damaged") from error
    if stored.algorithm != "ed25519" or raw not in known:
        raise InvalidInputError(f"{folder} is signed with another key than {', '.join(map(str, keys))}")
    from cryptography.exceptions import InvalidSignature

    path, key = known[raw]
    try:
        key.verify(signature, _message(manifest))
    except InvalidSignature as error:
        raise InvalidInputError(
            f"{folder} was changed after it was signed, or its signature is of another artifact: do not use it"
        ) from error
    return Signature(path, manifest.sha256)


@contextmanager
def signature_required(keys: Sequence[Path]) -> Iterator[None]:
    """Let nothing be opened that none of the keys' owners signed, in any thread of this process."""
    _demanded.extend(keys)
    try:
        yield
    finally:
        del _demanded[len(_demanded) - len(keys) :]


def required_keys() -> list[Path]:
    """Public keys of which one has to have signed whatever is opened; none by default.

    They are those of `signature_required`, and those that the environment names in `REQUIRED`, which separates them
    as it does folders in ``PATH``.
    """
    return [*_demanded, *(Path(name) for name in os.environ.get(REQUIRED, "").split(os.pathsep) if name)]


def _message(manifest: Manifest) -> bytes:
    """What is signed: the kind and the hash of the whole manifest, apart from anything else that a key may sign."""
    return f"qdeploy artifact, version 1\n{manifest.kind}\n{manifest.integrity}\n".encode()


def _key(path: Path, private: bool) -> Any:
    serialization, ed25519 = _library()
    kind = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    word = "private" if private else "public"
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        content = path.read_bytes()
        load = serialization.load_pem_private_key if private else serialization.load_pem_public_key
        key = load(content, password=None) if private else load(content)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise UsageError(f"{path} is not a {word} key in PEM, or it is encrypted") from error
    if not isinstance(key, kind):
        raise UsageError(f"{path} is not an Ed25519 {word} key: openssl genpkey -algorithm ed25519 makes one")
    return key


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise CapabilityError("signatures need cryptography: pip install 'qdeploy[sign]'") from error
    return serialization, ed25519
