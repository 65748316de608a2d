"""Parameters of a function, read from its source: nothing that it needs is imported.

The types and defaults of the command line's options are those of the functions that verbs call. Importing such a
function takes seconds (torch, diffusers), which ``--help`` must not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
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
    return {each.name: each for each in _parameters(found[-1].args, _constants(_tree(module)))}


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no module {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that a module gives to plain values: numbers, words, and tuples and tables of them."""
    found: dict[str, Any] = {}
    for each in tree.body:
        if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name):
            with suppress(ValueError):
                found[each.targets[0].id] = ast.literal_eval(each.value)
    return found


def _parameters(arguments: ast.arguments, constants: dict[str, Any]) -> Iterator[Parameter]:
    plain = [*arguments.posonlyargs, *arguments.args]
    without = len(plain) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*[None] * without, *arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip([*plain, *arguments.kwonlyargs], defaults, strict=True):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        yield Parameter(argument.arg, annotation, REQUIRED if default is None else _value(default, constants))


def _value(default: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of an expression of constants.

    Raises:
        LookupError: it has a name that is not one of the module's constants: give the parameter a plain default.
    """
    code = compile(ast.Expression(default), "<default>", "eval")
    try:
        return eval(code, {"__builtins__": {}}, constants)  # noqa: S307 (of our own source)
    except NameError as error:
        raise LookupError(
            f"the default {ast.unparse(default)} cannot be read from the source: {error}"
        ) from error
