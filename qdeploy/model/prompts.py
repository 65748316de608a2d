"""Prompt sets: one prompt per line, or captions as COCO's JSON holds them.

Only the needed lines are read: a file of a million lines costs no more than one of a hundred, unless a random
sample of it is requested. Where more than 5000 lines are needed they stay in the file, and are read when their images
are made.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

from qdeploy.system.errors import InvalidInputError, UsageError
from qdeploy.system.progress import say

LIMIT = 5000
LONGEST = 10_000  # characters; a longer line is no prompt
LARGEST_JSON = 2**30


class PromptFile(Sequence[str]):
    """The first prompts of a text file, which stay there: eight bytes of memory for each.

    Args:
        file: UTF-8 text with one prompt per line; empty lines are no prompts.
        count: how many at most.
        sha256: of the prompts, if they are known already.

    Raises:
        InvalidInputError: there is no such file, it is no text, holds no prompt, or others than are known.
    """

    def __init__(self, file: str | Path, count: int, sha256: str | None = None) -> None:
        self.file, self._offsets, found = Path(file).resolve(), array("Q"), hashlib.sha256()
        try:
            with self.file.open("rb") as stream:
                for offset, text in islice(_lines_with_offsets(self.file, stream), count):
                    self._offsets.append(offset)
                    found.update(f"{text}\n".encode())
        except OSError as error:
            raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error
        self.sha256 = found.hexdigest()
        if not self._offsets:
            raise InvalidInputError(f"{file} holds no prompt")
        if sha256 not in (None, self.sha256):
            raise InvalidInputError(f"{file} holds other prompts than were planned with")

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        """A prompt, or several: those lines are read now."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        with self.file.open("rb") as stream:
            offset = self._offsets[number]
            stream.seek(offset)
            return stream.readline().decode("utf-8" if offset else "utf-8-sig").strip()

    def __deepcopy__(self, known: Any) -> PromptFile:
        return self

    def to_json(self) -> dict[str, Any]:
        """What determines it, without its place."""
        return {"count": len(self), "sha256": self.sha256}

    def arguments_json(self) -> dict[str, Any]:
        """Its arguments in JSON's types."""
        return {"file": str(self.file), **self.to_json()}


def read_prompts(file: Path, limit: int | None = None, seed: int | None = None) -> Sequence[str]:
    """Prompts of a file, without empty lines.

    Args:
        file: UTF-8 text with one prompt per line, or ``*.json`` with COCO captions: ``annotations``, each with
            a ``caption`` and the ``image_id`` it belongs to. Of each image the caption with the lowest ``id``
            is taken, in the order of the images' numbers.
        limit: how many to take at most; 5000 by default.
        seed: draw them at random from the whole file; by default the first ones are taken.

    Raises:
        UsageError: the limit is no positive number.
        InvalidInputError: there is no such file, it is no text, no captions, or holds no prompt.
    """
    wanted = LIMIT if limit is None else limit
    if wanted < 1:
        raise UsageError(f"the number of prompts must be at least 1, not {wanted}")
    try:
        coco = file.suffix.lower() == ".json"
        if wanted > LIMIT and not coco and seed is None:
            return PromptFile(file, wanted)
        with file.open("rb") as stream:
            prompts = iter(_captions(file)) if coco else _lines(file, stream)
            chosen = list(islice(prompts, wanted)) if seed is None else _sample(prompts, wanted, seed)
            more = seed is None and next(prompts, None) is not None
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error
    if not chosen:
        raise InvalidInputError(f"{file} holds no prompt")
    if more and limit is None:
        say(
            f"{file} holds more than {wanted} prompts: the first {wanted} are used; --prompt-count takes more"
        )
    return chosen


def _lines(file: Path, stream: BinaryIO) -> Iterator[str]:
    return (text for _, text in _lines_with_offsets(file, stream))


def _lines_with_offsets(file: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    begin = 0
    for number, line in enumerate(_bounded(file, stream), 1):
        offset, begin = begin, begin + len(line)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{file} is no UTF-8 text, first in line {number}") from error
        if "\0" in text:
            raise InvalidInputError(f"{file} is no UTF-8 text: line {number} holds a null character")
        if text:
            yield offset, text


def _bounded(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Lines, of which none is read that is too long to be a prompt: a binary file may be one line of gigabytes."""
    number = 0
    while line := stream.readline(4 * LONGEST + 1):
        number += 1
        if len(line) > 4 * LONGEST:
            raise InvalidInputError(
                f"{file} holds no prompts: line {number} is longer than {LONGEST} characters"
            )
        yield line


def _captions(file: Path) -> list[str]:
    """A caption of each image, in the order of the images' numbers."""
    if file.stat().st_size > LARGEST_JSON:
        raise InvalidInputError(
            f"{file} is larger than {LARGEST_JSON // 2**20} MiB: write prompts one per line"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        notes = [(int(note["image_id"]), int(note["id"]), note["caption"]) for note in content["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInputError(
            f"{file} holds no COCO captions: annotations with image_id, id and caption are needed"
        ) from error
    if not all(isinstance(caption, str) for _, _, caption in notes):
        raise InvalidInputError(f"{file} holds a caption that is no text")
    first: dict[int, str] = {}
    for image, _, caption in sorted(notes):
        first.setdefault(image, " ".join(caption.split()))
    return [caption for _, caption in sorted(first.items()) if caption]


def _sample(prompts: Iterator[str], count: int, seed: int) -> list[str]:
    """So many at random, in the file's order; each equally likely, whatever their number (Vitter's algorithm R)."""
    draw, kept = random.Random(seed), []
    for number, prompt in enumerate(prompts):
        if number < count:
            kept.append((number, prompt))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, prompt)
    return [prompt for _, prompt in sorted(kept)]
