"""Joining tensors of many files into one file, in the memory of one of them.

The format (safetensors): eight bytes with the length of the header, the header as JSON padded with spaces to a
multiple of eight bytes, then the values of all tensors. Joined along their first dimension, the rows of files in
order are one run of bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qdeploy.store.files import write_atomically
from qdeploy.system.errors import InvalidInputError

_LENGTH = 8


def join_tensors(files: Sequence[Path], path: Path) -> None:
    """Write one file with the rows of all: the same bytes as `qdeploy.store.files.save_tensors`.

    Args:
        files: each with one tensor, of the same name, dtype and shape but for the first dimension.
        path: the file to write.

    Raises:
        InvalidInputError: they do not fit together.
    """
    described = [_header(file) for file in files]
    (name, first), *others = described[0].items()
    for file, header in zip(files, described, strict=True):
        fits = header.keys() == {name} and header[name]["dtype"] == first["dtype"]
        if others or not fits or header[name]["shape"][1:] != first["shape"][1:]:
            raise InvalidInputError(
                f"{file} does not fit to {files[0]}: its tensors differ in name, dtype or shape"
            )
    rows = sum(header[name]["shape"][0] for header in described)
    size = sum(header[name]["data_offsets"][1] for header in described)
    whole = {"dtype": first["dtype"], "shape": [rows, *first["shape"][1:]], "data_offsets": [0, size]}
    text = json.dumps({name: whole}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)

    def write(partial: Path) -> None:
        with partial.open("wb") as target:
            target.write(len(text).to_bytes(_LENGTH, "little") + text)
            for file in files:
                with file.open("rb") as source:
                    source.seek(_LENGTH + _length(source))
                    shutil.copyfileobj(source, target)

    write_atomically(path, write)


def shape_of(file: Path, name: str) -> list[int]:
    """The shape of a tensor, without reading it."""
    shape: list[int] = _header(file)[name]["shape"]
    return shape


def _length(stream: BinaryIO) -> int:
    return int.from_bytes(stream.read(_LENGTH), "little")


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(_length(stream)))
    header.pop("__metadata__", None)
    return header
