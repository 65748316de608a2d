"""A part as one stream of bytes, for machines that share no disk."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import BinaryIO

from qdeploy.store.files import sync
from qdeploy.system.errors import InvalidInputError


def pack(folder: Path) -> bytes:
    """The files of a part, as a tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name, recursive=False)
    return stream.getvalue()


def unpack(stream: BinaryIO, folder: Path) -> None:
    """Write the files of a packed part into a folder, which is there.

    Raises:
        InvalidInputError: it is cut off, or holds anything but plain files with plain names.
        OSError: the system refuses to write.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or Path(member.name).name != member.name or member.name in ("", ".", ".."):
                    raise InvalidInputError(f"a packed part holds {member.name!r}, which is no plain file")
                with (folder / member.name).open("wb") as target:
                    shutil.copyfileobj(content, target)
                sync(folder / member.name)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidInputError(f"a packed part is damaged: {error}") from error
