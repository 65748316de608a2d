"""Parameters of a function, read from its source: nothing that it needs is imported.

The types and defaults of the command line's options are those of the functions that verbs call. Importing such a
function takes seconds (torch, diffusers), which ``--help`` must not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: its name.
        annotation: its type, as it is written.
        default: its default, or `REQUIRED`.
    """

    name: str
    annotation: str
    default: Any

    @property
    def kinds(self) -> frozenset[str]:
        """The words of the annotation: ``{"str", "Path", "None"}``."""
        words = self.annotation.replace("[", "|").replace("]", "|").replace(",", "|").split("|")
        return frozenset(word.strip() for word in words)


@cache
def parameters(module: str, function: str) -> dict[str, Parameter]:
    """Parameters of a module's function by name, without ``*`` and ``**`` ones. Of overloads the last counts.

    Raises:
        LookupError: there is no such function.
    """
    found = [
        each for each in _tree(module).body if isinstance(each, ast.FunctionDef) and each.name == function
    ]
    if not found:
        raise LookupError(f"{module} has no function {function}")
    return {each.name: each for each in _parameters(found[-1].args)}


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no module {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    plain = [*arguments.posonlyargs, *arguments.args]
    without = len(plain) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*[None] * without, *arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip([*plain, *arguments.kwonlyargs], defaults, strict=True):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        yield Parameter(argument.arg, annotation, REQUIRED if default is None else _value(default))


def _value(default: ast.expr) -> Any:
    """The value of a constant expression."""
    code = compile(ast.Expression(default), "<default>", "eval")
    return eval(code, {"__builtins__": {}})
