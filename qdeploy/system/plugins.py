"""Plugins: what this package and others register: methods, metrics, passes, engines and lint rules.

A package registers a module, a package of modules, or a single object as an entry point
(https://packaging.python.org/specifications/entry-points/), in its own ``pyproject.toml``:

    [project.entry-points."qdeploy.methods"]
    my-method = "my_package.my_method"

What qdeploy brings itself comes first in each group, and is loaded in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from traceback import walk_tb
from types import ModuleType
from typing import Any, NamedTuple

from qdeploy.system.errors import CapabilityError
from qdeploy.system.hashing import sha256_file

METHODS, METRICS, PASSES = "qdeploy.methods", "qdeploy.metrics", "qdeploy.passes"
ENGINES, LINT_RULES = "qdeploy.engines", "qdeploy.lint_rules"

# What qdeploy registers itself. It is listed here and not in pyproject.toml, so that a checkout that was updated
# without being installed again still finds it.
_OWN = (
    EntryPoint("qdeploy", "qdeploy.calibrate.methods", METHODS),
    EntryPoint("qdeploy", "qdeploy.evaluate.metrics", METRICS),
    EntryPoint("tensorrt", "qdeploy.engines.tensorrt:BACKEND", ENGINES),
    EntryPoint("tensorrt-rtx", "qdeploy.engines.tensorrt_rtx:BACKEND", ENGINES),
    EntryPoint("onnxruntime-tensorrt", "qdeploy.engines.onnxruntime_tensorrt:BACKEND", ENGINES),
    EntryPoint("onnxruntime-tensorrt-rtx", "qdeploy.engines.onnxruntime_tensorrt_rtx:BACKEND", ENGINES),
    EntryPoint("openvino", "qdeploy.engines.openvino:BACKEND", ENGINES),
    EntryPoint("onnxruntime", "qdeploy.engines.onnxruntime:BACKEND", ENGINES),
    EntryPoint("qdeploy", "qdeploy.export.lint.rules", LINT_RULES),
    EntryPoint("qdeploy-fixes", "qdeploy.export.lint.fixes", LINT_RULES),
)


class Registered(NamedTuple):
    """One module or object of a group, and the package that registered it."""

    package: str
    value: Any


@cache
def registered(group: str) -> tuple[Registered, ...]:
    """Every module and object of a group, this package's own first; of a package, each of its modules.

    Raises:
        CapabilityError: one cannot be imported.
    """
    others = sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))
    own = [entry for entry in _OWN if entry.group == group]
    return tuple(Registered(_package(entry), value) for entry in (*own, *others) for value in _loaded(entry))


def named(group: str, wanted: Callable[[Any], bool], what: str) -> dict[str, Any]:
    """The objects of a group by their ``name``, in the order in which they are found.

    Args:
        group: one of this module's names.
        wanted: whether an object is one of those looked for. Modules are searched for them, and tuples in
            modules; a class counts for the module that defines it alone.
        what: what they are called in errors.

    Raises:
        CapabilityError: a module cannot be imported, or two packages use one name for different objects.
    """
    found: dict[str, Registered] = {}
    for package, each in objects(group, wanted):
        first = found.setdefault(each.name, Registered(package, each))
        if first.value is not each:
            raise CapabilityError(
                f"{first.package} and {package} both register a {what} {each.name!r}: uninstall one of them"
            )
    return {name: each.value for name, each in found.items()}


def objects(group: str, wanted: Callable[[Any], bool]) -> list[Registered]:
    """The objects of a group that are looked for (see `named`), in the order in which they are found.

    Raises:
        CapabilityError: a module cannot be imported.
    """
    return [
        Registered(package, each)
        for package, value in registered(group)
        for each in _objects(value)
        if wanted(each)
    ]


def code_of(objects: Iterable[Any]) -> dict[str, str]:
    """The code of other packages that defines some classes or functions: the SHA-256 of each module's file, by name.

    Requests and caches name it, so that a stage, pass or metric that was edited is run again. For what this package
    brings its version stands; scripts and notebooks are left out.
    """
    names = {each.__module__ for each in objects}
    files = {
        name: getattr(sys.modules.get(name), "__file__", None)
        for name in sorted(names)
        if name != "__main__" and name.partition(".")[0] != "qdeploy"
    }
    return {name: sha256_file(Path(file)) for name, file in files.items() if file and Path(file).is_file()}


def other_module(error: BaseException) -> str | None:
    """The module of another package that raised an error or called what raised it, innermost first; else None."""
    packages = {
        entry.module.partition(".")[0]
        for group in (METHODS, METRICS, PASSES, ENGINES, LINT_RULES)
        for entry in entry_points(group=group)
    }
    called = [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__)]
    return next((name for name in reversed(called) if name.partition(".")[0] in packages), None)


def _objects(value: Any) -> Iterator[Any]:
    if not isinstance(value, ModuleType):
        yield value
        return
    for each in vars(value).values():
        for one in each if isinstance(each, tuple | list) else (each,):
            if not isinstance(one, type) or one.__module__ == value.__name__:
                yield one


def _loaded(entry: EntryPoint) -> Iterator[Any]:
    try:
        value = entry.load()
        yield value
        if isinstance(value, ModuleType):
            for info in iter_modules(getattr(value, "__path__", ())):
                yield import_module(f"{value.__name__}.{info.name}")
    except Exception as error:
        if _package(entry) == "qdeploy":
            raise
        raise CapabilityError(
            f"the package {_package(entry)} registers {entry.name} = {entry.value} in {entry.group}, which cannot "
            f"be imported ({type(error).__name__}: {error}): repair or uninstall it"
        ) from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "qdeploy"
