"""What a long piece of work has finished so far: steps on disk, each with its hash, and the time they took.

A step whose file does not match its hash, after a failure of the disk or of the power, counts as not done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.store.bounded_json import read_json_object
from qdeploy.store.files import save_tensors, write_atomically, write_json, write_text
from qdeploy.system.errors import InvalidInputError
from qdeploy.system.hashing import sha256_file

if TYPE_CHECKING:
    from torch import Tensor


class Journal:
    """Hashes of finished files below a folder.

    Args:
        folder: of the work; hashes are kept in its folder ``hashes``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes = folder / "hashes"

    def keep_tensors(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, in place of what was kept in that file before."""
        self._keep(file, lambda partial: save_tensors(tensors, partial))

    def keep_value(self, file: Path, value: object) -> None:
        """Write a JSON value, in place of what was kept in that file before."""
        text = json.dumps({"value": value}, indent=2, sort_keys=True)

        def write(partial: Path) -> None:
            partial.write_text(text)

        self._keep(file, write)

    def _keep(self, file: Path, write: Callable[[Path], None]) -> None:
        """Write a file so that, wherever this is stopped, either the new or the former content counts."""
        mark = self._mark(file)
        former = mark.read_text().split()[:1] if mark.is_file() else []

        def marked(partial: Path) -> None:
            write(partial)
            write_text(mark, "\n".join([sha256_file(partial), *former]))

        write_atomically(file, marked)

    def has(self, file: Path) -> bool:
        """Whether a file is there and matches its hash."""
        mark = self._mark(file)
        return file.is_file() and mark.is_file() and sha256_file(file) in mark.read_text().split()

    def tensors(self, file: Path) -> dict[str, Tensor] | None:
        """The tensors of a file; None, and no file, if it is not as it was kept."""
        from safetensors.torch import load_file

        if self.has(file):
            return load_file(file)
        self.forget(file)
        return None

    def value(self, file: Path) -> Any:
        """The JSON value of a file; None if it is not as it was kept."""
        return read_json_object(file)["value"] if self.has(file) else None

    def forget(self, file: Path) -> None:
        """Remove a file and its hash."""
        self._mark(file).unlink(missing_ok=True)
        file.unlink(missing_ok=True)

    def _mark(self, file: Path) -> Path:
        return self.hashes / file.relative_to(self.folder).as_posix().replace("/", "+")


class WorkTime:
    """Seconds of work, in all and by label, over all processes that took part in it.

    What a process did after its last `lap` is lost when it is killed.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._since = time.perf_counter()
        self._label = ""
        try:
            self._seconds = {name: float(value) for name, value in read_json_object(file).items()}
        except (InvalidInputError, TypeError, ValueError):
            self._seconds = {}

    @property
    def total(self) -> float:
        """Seconds up to now."""
        return sum(self._seconds.values()) + time.perf_counter() - self._since

    def label(self, name: str) -> None:
        """Count what follows under a name."""
        self.lap()
        self._label = name

    def by_label(self) -> dict[str, float]:
        """Seconds under each name, in the order of their first use."""
        self.lap()
        return {name: round(value, 3) for name, value in self._seconds.items() if name}

    def lap(self) -> None:
        """Write down what has passed since the last time."""
        now = time.perf_counter()
        self._seconds[self._label] = self._seconds.get(self._label, 0.0) + now - self._since
        self._since = now
        write_json(self._file, self._seconds)
