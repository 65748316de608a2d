"""Samples in tar files, as webdataset and its relatives read them.

    shard-000000.tar    00000.png, 00000.json, 00000.txt, 00001.png, ...

Files with one stem are one sample: the picture, its seed and settings, and its prompt if there was one. Parts make
the bodies of such files, whose bytes depend on the content alone; shards are bodies in order with an end.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BODY = "body.tar"
_END = 2 * tarfile.BLOCKSIZE  # zeros that end a tar file


def pack(folder: Path, items: Sequence[Path], described: Sequence[Mapping[str, Any]]) -> None:
    """Move files of samples into the body of a tar file, without its end.

    Args:
        folder: where the body goes.
        items: a file for each sample.
        described: what is known of each, in JSON's types; its ``prompt`` is a file of its own too.
    """
    with (folder / BODY).open("wb") as target:
        for item, known in zip(items, described, strict=True):
            _add(target, item.name, item.read_bytes())
            _add(target, f"{item.stem}.json", json.dumps(known, sort_keys=True).encode())
            if "prompt" in known:
                _add(target, f"{item.stem}.txt", str(known["prompt"]).encode())
            item.unlink()


def _add(target: io.BufferedWriter, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size, about.mode = len(content), 0o644
    target.write(about.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))


def join(bodies: Sequence[Path], folder: Path, together: int) -> None:
    """Write shards.

    Args:
        bodies: what `pack` wrote, in order.
        folder: of the shards.
        together: bodies in each; the last shard may have fewer.
    """
    for number, first in enumerate(range(0, len(bodies), together)):
        with (folder / f"shard-{number:06d}.tar").open("wb") as target:
            for body in bodies[first : first + together]:
                with body.open("rb") as source:
                    shutil.copyfileobj(source, target)
            end = target.tell() + _END
            target.write(bytes(_END + -end % tarfile.RECORDSIZE))
