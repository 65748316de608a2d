"""Manifests: the file ``qdeploy.json`` in every artifact's folder, read strictly and held against the files.

    kind, schema, version   what it is, and which qdeploy wrote it
    request                 a hash of what was asked for: only the same request accepts what is there
    files                   SHA-256 of every file
    made_from               SHA-256 of every artifact or model it was made from
    recipe, seed, facts     everything else that determines the content
    sha256                  the identity: a hash of all of the above but version and request
    measured, notes         what depends on the machine (times, paths); not part of the identity
    integrity               a hash of the whole manifest, so that damage anywhere is found

The JSON Schema of manifests is in ``docs/manifest.schema.json``; `qdeploy.store.schema` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.field_types import Identifier, Seed, Sha256, Word
from qdeploy.store.names import contained, entries, name_problem
from qdeploy.store.tensors import header_problem
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file, sha256_of

SCHEMA = 1
MANIFEST = "qdeploy.json"
IDENTITY = ("kind", "schema", "files", "made_from", "recipe", "seed", "facts")
LARGEST_MANIFEST = 16 * 2**20  # bytes
MOST_FILES = 100_000
SIGNATURE = "qdeploy.json.sig"
RANGES_PICTURE = "ranges.png"  # drawn into calibration sets when they are whole; its bytes depend on fonts


_S = TypeVar("_S", bound=Struct)


class Notes(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where things were when an artifact was made; of no consequence to what it is.

    Attributes:
        source: what the model that it was made from was opened by: a folder, with ``@VARIANT`` if one was chosen.
        pipeline: folder of the pipeline that made images.
        file: that a calibration set was imported from.
    """

    source: str | None = None
    pipeline: str | None = None
    file: str | None = None


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of ``qdeploy.json``, as described above; facts are typed by the artifact's kind."""

    kind: Word
    schema: Annotated[int, Meta(ge=1, le=SCHEMA)]
    version: Word
    request: Sha256
    files: Annotated[dict[Annotated[str, Meta(max_length=4096)], Sha256], Meta(max_length=MOST_FILES)]
    made_from: Annotated[dict[Identifier, Sha256], Meta(max_length=64)]
    recipe: dict[str, Any] | None
    seed: Seed | None
    facts: dict[str, Any]
    measured: dict[str, Any]
    notes: Notes
    sha256: Sha256
    integrity: Sha256


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a folder that claims to be an artifact."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a folder; types, ranges, names and hashes within it checked, the files not.

    Raises:
        InvalidInputError: there is none that this version can read.
    """
    if not path.exists():
        raise InvalidInputError(
            f"{path} does not exist: what is needed here is the folder of an artifact, as `qdeploy collect`, "
            "`calibrate`, `export` and `build-engine` write it"
        )
    if not is_artifact(path):
        raise InvalidInputError(f"{path} is not a qdeploy artifact: it has no {MANIFEST}")
    try:
        content = read_json_object(contained(path, MANIFEST), LARGEST_MANIFEST)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path} is damaged: {error}") from error
    schema = content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise InvalidInputError(
            f"{path} was written by a newer qdeploy (schema {schema}, this one reads up to {SCHEMA}): "
            "upgrade qdeploy"
        )
    manifest = typed(content, Manifest, path)
    if manifest.integrity != sha256_of({key: item for key, item in content.items() if key != "integrity"}):
        raise InvalidInputError(f"{path} is damaged: its {MANIFEST} was changed after it was written")
    if manifest.sha256 != sha256_of({key: content[key] for key in IDENTITY}):
        raise InvalidInputError(f"{path} is damaged: its sha256 is not that of its content")
    for name in manifest.files:
        if problem := name_problem(name):
            raise InvalidInputError(f"{path} lists a file {name[:100]!r}, which {problem}: do not use it")
    return manifest


def typed(value: object, kind: type[_S], path: Path) -> _S:
    """A JSON value of a manifest as an object of a typed class.

    Raises:
        InvalidInputError: something is missing, unknown, or of another type or range.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidInputError(
            f"{path} cannot be used: {MANIFEST} is not as it should be: {error}"
        ) from error


def damage(path: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with an artifact's files, a sentence each."""
    for name, recorded in manifest.files.items():
        try:
            file = contained(path, name)
        except InvalidInputError as error:
            yield str(error)
            continue
        if sha256_file(file) != recorded:
            yield f"the file {name} does not match its recorded hash"
        elif name.endswith(".safetensors") and (reason := header_problem(file)):
            yield f"the file {name} holds no tensors that can be read ({reason})"
    for name in entries(path):
        if name not in manifest.files and not _is_spare(name):
            yield f"the file {name} is not listed in its {MANIFEST}: remove it"


def _is_spare(name: str) -> bool:
    """Whether a file may lie in an artifact's folder without being part of it, since it is never read.

    That is the picture of a set's ranges, a signature, texts for people, and what has a hidden name.
    """
    if name in (MANIFEST, SIGNATURE, RANGES_PICTURE) or any(part.startswith(".") for part in name.split("/")):
        return True
    return "/" not in name and (name.endswith(".md") or name.startswith(("LICENSE", "NOTICE")))
