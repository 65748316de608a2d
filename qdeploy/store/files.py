"""Writing files so that they are whole or not there, and saying why where the system refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.system.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(partial: Path) -> None:
        partial.write_text(text)

    write_atomically(path, write)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""

    def write(partial: Path) -> None:
        shutil.copyfile(source, partial)

    write_atomically(target, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; the same tensors make the same bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda partial: _save_tensors(contiguous, partial))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library reports the system's refusals as text; they are ours to explain.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def explained_os_errors(output: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into a sentence about ``output``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapabilityError(
                f"no space left for {output}: free some and run the same command again, finished steps are kept"
            ) from error
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error
