"""Prompt files: one prompt per line."""

from __future__ import annotations

from pathlib import Path

from qdeploy.errors import InvalidInputError

LARGEST = 64 * 2**20


def read_prompts(file: Path) -> list[str]:
    """The prompts of a UTF-8 text file, without empty lines.

    Raises:
        InvalidInputError: there is no such file, it is no text, too large, or holds no prompt.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise InvalidInputError(f"{file} is larger than {LARGEST // 2**20} MiB: pass fewer prompts")
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file} is no UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidInputError(f"{file} holds no prompt")
    return prompts
