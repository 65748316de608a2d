"""Hashes of JSON values and of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def canonical(value: object) -> bytes:
    """JSON bytes that depend on the value only: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(value: object) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_files(paths: Mapping[str, Path]) -> str:
    """One SHA-256 over named files."""
    return sha256_of({name: sha256_file(path) for name, path in paths.items()})
