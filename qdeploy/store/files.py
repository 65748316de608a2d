"""Writing files so that they are whole or not there, and saying why where the system refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
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
    # Processes on several machines may have the same number.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # as the umask says; some libraries write files for the owner alone
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_below(folder: Path) -> None:
    """Make all files below a folder, and their names, survive a loss of power: libraries write without a sync."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the renames within a folder, survive a loss of power, where the system can."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)


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
    write_atomically(path, lambda partial: save_tensors(tensors, partial))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the system refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
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
