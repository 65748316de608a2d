"""Artifacts: one folder per stage, described, hashed and written whole or not at all.

A folder holds its files and a manifest, ``qdeploy.json``:

    kind, schema, version   what it is, and which qdeploy wrote it
    files                   SHA-256 of every file
    made_from               SHA-256 of every artifact or model it was made from
    recipe, seed, facts     everything else that determines the content
    sha256                  the identity: a hash of all of the above
    measured, notes         what depends on the machine (times, paths); not part of the identity
    integrity               a hash of the whole manifest, so that damage anywhere is found

`qdeploy.store.builder` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file, sha256_of

if TYPE_CHECKING:
    pass

SCHEMA = 1
MANIFEST = "qdeploy.json"
KINDS = {
    "calibration-set": "denoiser inputs recorded along the sampling trajectory",
    "checkpoint": "integer weights and activation scales",
    "onnx": "an ONNX graph, with Q/DQ where it is quantized",
    "engine": "a graph that one backend runs",
    "samples": "images, with their seeds",
    "sensitivity": "how much each layer suffers from each number format",
}
IDENTITY = ("kind", "schema", "files", "made_from", "recipe", "seed", "facts")


@dataclass(frozen=True)
class Artifact:
    """A complete, verified artifact folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.manifest["kind"])

    @property
    def sha256(self) -> str:
        """The identity: equal content made in the same way has an equal hash."""
        return str(self.manifest["sha256"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage says of its content; part of the identity."""
        return dict(self.manifest["facts"])

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe, where one was involved."""
        recipe: dict[str, Any] | None = self.manifest["recipe"]
        return recipe

    def file(self, name: str) -> Path:
        """Path of one of the artifact's files."""
        return self.path / name

    def summary(self, seconds: float) -> dict[str, Any]:
        """The JSON object that every verb prints for what it wrote."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "seconds": round(seconds, 3),
        }


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a folder that claims to be an artifact."""
    return (path / MANIFEST).is_file()


def open_artifact(path: str | Path | Artifact, *kinds: str) -> Artifact:
    """Read and verify an artifact.

    Args:
        path: the folder; or an artifact, which is read and verified again.
        kinds: the kinds that are welcome; any, if none is named.

    Raises:
        InvalidInputError: it is no artifact, damaged, of a newer schema or of another kind.
    """
    path = path.path if isinstance(path, Artifact) else Path(path)
    manifest = read_manifest(path)
    if kinds and manifest["kind"] not in kinds:
        wanted = " or ".join(kinds)
        raise InvalidInputError(f"{path} is of kind {manifest['kind']!r}, but {wanted!r} is needed here")
    for problem in damage(path, manifest):
        raise InvalidInputError(f"{path} is damaged: {problem}; make it again or restore it from a copy")
    return Artifact(path, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, its schema and integrity checked, the files not.

    Raises:
        InvalidInputError: there is none that this version can read.
    """
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist")
    if not is_artifact(path):
        raise InvalidInputError(f"{path} is not a qdeploy artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        schema, kind = int(manifest["schema"]), str(manifest["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is damaged: its {MANIFEST} cannot be read ({error})") from error
    if schema > SCHEMA:
        raise InvalidInputError(
            f"{path} was written by a newer qdeploy (schema {schema}, this one reads up to {SCHEMA}): "
            "upgrade qdeploy"
        )
    recorded = manifest.get("integrity")
    content = {key: value for key, value in manifest.items() if key != "integrity"}
    if recorded != sha256_of(content):
        raise InvalidInputError(f"{path} is damaged: its {MANIFEST} was changed after it was written")
    if kind not in KINDS:
        raise InvalidInputError(f"{path} is of the unknown kind {kind!r}")
    return dict(manifest)


def damage(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an artifact's files, a sentence each."""
    for name, recorded in manifest["files"].items():
        file = path / name
        if not file.is_file():
            yield f"the file {name} is missing"
        elif sha256_file(file) != recorded:
            yield f"the file {name} does not match its recorded hash"
