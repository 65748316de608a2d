"""Open safetensors files, with errors in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from qdeploy.system.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def open_tensors(file: Path, framework: Literal["pt", "numpy"] = "pt") -> Iterator[Any]:
    """The file as `safetensors.safe_open` has it: ``keys``, ``get_tensor`` and ``get_slice``.

    Its header is checked against the file's length; a tensor is read when it is asked for.

    Args:
        file: the file.
        framework: whose tensors it returns.

    Raises:
        InvalidInputError: it is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with cast(Any, safe_open)(str(file), framework=framework) as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file} is truncated or no safetensors file ({error})") from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name.

    Raises:
        InvalidInputError: it is truncated or no safetensors file.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- no mapping


def header_problem(file: Path) -> str | None:
    """Why the header of a safetensors file does not describe what is behind it; None if it does."""
    try:
        with open_tensors(file, "numpy"):
            return None
    except InvalidInputError as error:
        return str(error.__cause__)
