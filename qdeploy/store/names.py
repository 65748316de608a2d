"""Names of files within a folder that somebody else may have made: relative, contained, regular files.

A name comes from a manifest, a model's index or an ONNX graph. Before it is joined to a folder, it is checked
here; `contained` then looks at what lies on disk, so that no symbolic link leads out of the folder.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from qdeploy.system.errors import InvalidInputError

LONGEST_PART = 200  # characters; file systems end at 255 bytes, and temporary names are a little longer
DEEPEST = 16  # folders
_PART = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|]+")  # what Windows refuses, too
_RESERVED = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # devices of Windows


def name_problem(name: str) -> str | None:
    """What is wrong with a relative name, in words that follow it; None if it is in order."""
    parts = name.split("/")
    if not name or len(parts) > DEEPEST:
        return "is empty or too deep"
    for part in parts:
        if part in ("", ".", ".."):
            return "is not a plain path within the folder"
        if not _PART.fullmatch(part) or _RESERVED.fullmatch(part) or part[-1] in " .":
            return "has characters that no file name may have"
        if len(part) > LONGEST_PART:
            return "is too long"
    return None


def check_name(name: str, where: str | Path) -> str:
    """A relative name that stays within its folder, as it is.

    Raises:
        InvalidInputError: it is absolute, climbs out of the folder with ``..``, or no file can be called so.
    """
    if problem := name_problem(name):
        raise InvalidInputError(
            f"{where} names a file {name[:LONGEST_PART]!r}, which {problem}: do not use it"
        )
    return name


def contained(folder: Path, name: str) -> Path:
    """The regular file ``name`` below ``folder``.

    Symbolic links are followed where they stay within the folder. In a snapshot of the Hub's cache,
    ``models--OWNER--NAME/snapshots/REVISION``, they may also lead to the ``blobs`` of the same repository.

    Raises:
        InvalidInputError: the name is no plain relative path, leads out of the folder, or is no regular file.
    """
    path = folder / check_name(name, folder)
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"the file {name} of {folder} is missing") from error
    root = Path(os.path.realpath(folder))
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise InvalidInputError(f"the file {name} of {folder} is a link to outside of it: do not use it")
    if not stat.S_ISREG(mode):
        raise InvalidInputError(f"the file {name} of {folder} is not a regular file")
    return path


def is_contained(folder: Path, name: str) -> bool:
    """Whether ``name`` is a regular file below ``folder`` (see `contained`)."""
    try:
        contained(folder, name)
    except InvalidInputError:
        return False
    return True


def _blobs(root: Path) -> list[Path]:
    """Where the files of a snapshot in the Hub's cache, or of a folder in one, really lie."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            blobs = repository / "blobs"
            return [] if blobs.is_symlink() else [blobs]
    return []


def entries(folder: Path) -> list[str]:
    """Names of all that lies below a folder but for folders themselves, ascending; a link to one is an entry."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links]
        found += [(Path(where) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)
