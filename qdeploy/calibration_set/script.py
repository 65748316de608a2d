"""A user's own loop over a pipeline, in a Python file or in memory."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.system.errors import InvalidInputError, QDeployError
from qdeploy.system.hashing import sha256_file

FUNCTION = "calls"

Calls = Callable[[Any], object] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Script:
    """A Python file that defines ``calls(pipeline)``, a function that calls the pipeline it is given.

    Attributes:
        path: the file. It is run with all rights of this process: run none that you have not read.
    """

    path: Path

    @property
    def sha256(self) -> str:
        """Hash of the file.

        Raises:
            InvalidInputError: there is none.
        """
        if not self.path.is_file():
            raise InvalidInputError(f"there is no script {self.path}")
        return sha256_file(self.path)

    def __call__(self, pipeline: Any) -> None:
        """Run it.

        Raises:
            InvalidInputError: it defines no such function, or raises.
        """
        folder = str(self.path.resolve().parent)
        sys.path.insert(0, folder)
        try:
            function = runpy.run_path(str(self.path)).get(FUNCTION)
            if not callable(function):
                raise InvalidInputError(f"{self.path} defines no function {FUNCTION}(pipeline)")
            function(pipeline)
        except QDeployError:
            raise
        except SystemExit as error:
            if error.code not in (None, 0):
                raise InvalidInputError(f"{self.path} ended with exit code {error.code}") from error
        except Exception as error:
            raise InvalidInputError(f"{self.path}{self._line(error)} raised {_described(error)}") from error
        finally:
            sys.path.remove(folder)

    def _line(self, error: Exception) -> str:
        """The script's own line that led to an error, as part of a sentence."""
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            return f", line {error.lineno},"
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        return f", line {lines[-1]}," if lines else ""


def as_function(calls: Calls) -> Callable[[Any], object]:
    """A function that makes the calls, whatever form they have."""
    if callable(calls):
        return calls

    def each(pipeline: Any) -> None:
        for arguments in calls:
            pipeline(**arguments)

    return each


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")
